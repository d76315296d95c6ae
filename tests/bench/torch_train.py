"""One rank of one configuration of the peer: whole training steps of PyTorch on the CPU.

Builds the model, warms it up (which compiles it where asked to), says so on standard output, with the
time at which all ranks had done the first step and the number of parameters, and then obeys lines on
standard input: `measure N` runs N steps and answers with their seconds and this process's peak memory;
the end of the input ends the process. So the configurations of a model can be made once and measured in
turns. The data lie ready as tensors: nothing is read, decoded or shuffled.
"""
import argparse
import json
import os
import sys
import time

BATCHES = 8  # different ones, used in turn


def models(torch):
    nn, functional = torch.nn, torch.nn.functional

    def mlp():
        widths = (784, 500, 500)
        layers = [nn.Flatten()]
        for inputs, units in zip(widths, widths[1:]):
            layers += [nn.Linear(inputs, units), nn.BatchNorm1d(units), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(500, 10)), (1, 28, 28)

    def lenet():
        def stage(inputs, filters):
            return [nn.Conv2d(inputs, filters, 3, padding=1), nn.BatchNorm2d(filters), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*stage(1, 32), *stage(32, 64), nn.Flatten(), nn.Linear(64 * 7 * 7, 128), nn.ReLU(),
                             nn.Linear(128, 10)), (1, 28, 28)

    class Residual(nn.Module):
        """Two 3x3 convolutions beside a shortcut that subsamples and pads with zeros (He et al. 2015, option A)."""

        def __init__(self, inputs, filters, stride):
            super().__init__()
            self.first = nn.Conv2d(inputs, filters, 3, stride, 1, bias=False)
            self.first_norm = nn.BatchNorm2d(filters)
            self.second = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
            self.second_norm = nn.BatchNorm2d(filters)
            self.stride, self.grown = stride, filters - inputs

        def forward(self, x):
            y = functional.relu(self.first_norm(self.first(x)))
            y = self.second_norm(self.second(y))
            if self.stride > 1 or self.grown:
                before = self.grown // 2
                x = functional.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, before, self.grown - before))
            return functional.relu(y + x)

    def resnet20():
        layers = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        inputs = 16
        for filters in (16, 32, 64):
            for block in range(3):
                layers.append(Residual(inputs, filters, 2 if block == 0 and filters > 16 else 1))
                inputs = filters
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)), (3, 32, 32)

    class Bottleneck(nn.Module):
        """1x1, 3x3 and 1x1 convolutions beside a shortcut (He et al. 2015, the stride in the 3x3 one)."""

        def __init__(self, inputs, filters, stride):
            super().__init__()
            outputs = 4 * filters
            self.reduce, self.reduce_norm = nn.Conv2d(inputs, filters, 1, bias=False), nn.BatchNorm2d(filters)
            self.middle = nn.Conv2d(filters, filters, 3, stride, 1, bias=False)
            self.middle_norm = nn.BatchNorm2d(filters)
            self.grow, self.grow_norm = nn.Conv2d(filters, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
            self.shortcut = None
            if stride > 1 or inputs != outputs:
                self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                                              nn.BatchNorm2d(outputs))

        def forward(self, x):
            y = functional.relu(self.reduce_norm(self.reduce(x)))
            y = functional.relu(self.middle_norm(self.middle(y)))
            y = self.grow_norm(self.grow(y))
            return functional.relu(y + (x if self.shortcut is None else self.shortcut(x)))

    def resnet50():
        layers = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        inputs = 64
        for filters, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
            for block in range(blocks):
                layers.append(Bottleneck(inputs, filters, 2 if block == 0 and filters > 64 else 1))
                inputs = 4 * filters
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000)), (3, 224, 224)

    class Rows(nn.Module):
        """An LSTM that reads an image row by row and classifies by its last output."""

        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(28, 128, batch_first=True)
            self.out = nn.Linear(128, 10)

        def forward(self, x):
            return self.out(self.lstm(x.squeeze(1))[0][:, -1])

    return {"mlp": mlp, "lenet": lenet, "resnet20": resnet20, "resnet50": resnet50,
            "lstm": lambda: (Rows(), (1, 28, 28))}


def peak_bytes():
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no VmHWM")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=128, help="over all ranks")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--rendezvous", help="a file that does not exist yet; needed for more than one rank")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()

    import torch
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.ranks > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.distributed.init_process_group("gloo", init_method=f"file://{options.rendezvous}", rank=options.rank,
                                             world_size=options.ranks)
    model, shape = models(torch)[options.model]()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    model = model.to(memory_format=layout)
    if options.compiled:
        model = torch.compile(model)
    if options.ranks > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    rows = options.batch // options.ranks
    batches = [(torch.randn(rows, *shape).contiguous(memory_format=layout), torch.randint(0, 10, (rows,)))
               for _ in range(BATCHES)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def steps(count):
        for i in range(count):
            x, labels = batches[i % BATCHES]
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.precision == "bf16"):
                loss = torch.nn.functional.cross_entropy(model(x).float(), labels)
            loss.backward()
            optimizer.step()

    def barrier():
        if options.ranks > 1:
            torch.distributed.barrier()

    def say(**answer):
        print(json.dumps(answer), flush=True)

    steps(1)
    barrier()
    first_step = time.time()
    steps(options.warmup)
    barrier()
    say(ready=True, torch=torch.__version__, first_step_at=first_step, parameters=parameters)
    for line in sys.stdin:
        count = int(line.split()[1])
        barrier()
        start = time.perf_counter()
        steps(count)
        barrier()
        say(seconds=time.perf_counter() - start, peak_bytes=peak_bytes())
    if options.ranks > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
