"""The peer on one GPU: whole training steps of PyTorch, in each of its ways to run them.

    torch_gpu.py MODEL [--batch N] [--precision fp32|tf32|bf16] [--ways eager,graphed,compiled] [--seconds S | --serve]

eager: a call for every kernel. graphed: the whole step, optimizer included, captured once as a CUDA graph and
replayed. compiled: torch.compile's kernels, and the whole step of them captured and replayed in the same way. All are
channels_last, with the fused optimizer, and cuDNN's algorithms chosen by timing. The data lie on the GPU: nothing is
read, decoded or shuffled.

Prints a line of JSON for each way: median samples/s over rounds of at least a tenth of a second. With --serve it
prints {"ready": WAY, ...} or {"failed": WAY, "why": ...} for each, then {"prepared": true}, and obeys lines on standard
input: `measure WAY N` runs N steps and answers with their seconds; the end of the input ends it.
"""
import argparse
import json
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import torch_train  # noqa: E402

BATCHES = 8
WARMUP = 11  # steps, before a capture


class Way:
    """A model that has been made ready to be measured."""

    def __init__(self, torch, options, way):
        began, before = time.time(), torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(0)
        model, shape = torch_train.models(torch)[options.model]()
        self.torch, self.batch = torch, options.batch
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        classes = 1000 if options.model == "resnet50" else 10
        layout = torch.channels_last
        model = model.cuda().to(memory_format=layout)
        if way == "compiled":
            model = torch.compile(model)
        self.xs = [torch.randn(options.batch, *shape, device="cuda").contiguous(memory_format=layout)
                   for _ in range(2 if options.model == "resnet50" else BATCHES)]
        self.ys = [torch.randint(0, classes, (options.batch,), device="cuda") for _ in self.xs]
        self.x, self.y = self.xs[0].clone(memory_format=torch.preserve_format), self.ys[0].clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)

        def step():
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=options.precision == "bf16"):
                loss = torch.nn.functional.cross_entropy(model(self.x).float(), self.y)
            loss.backward()
            optimizer.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUP):
                step()
        torch.cuda.current_stream().wait_stream(side)
        # A captured graph does not keep what it uses.
        self.kept = (model, optimizer, step)
        self.run = step
        if way != "eager":
            self.graph = torch.cuda.CUDAGraph()
            optimizer.zero_grad(set_to_none=True)
            with torch.cuda.graph(self.graph):
                step()
            self.run = self.graph.replay
        torch.cuda.synchronize()
        self.ready = time.time() - began
        self.peak_bytes = torch.cuda.max_memory_allocated() - before

    def seconds(self, count):
        start = time.perf_counter()
        for i in range(count):
            self.x.copy_(self.xs[i % len(self.xs)])
            self.y.copy_(self.ys[i % len(self.ys)])
            self.run()
        self.torch.cuda.synchronize()
        return time.perf_counter() - start


def serve(torch, options):
    ways = {}
    for way in options.ways.split(","):
        try:
            ways[way] = Way(torch, options, way)
        except Exception as error:  # of any kind, from the compiler or the libraries: the other ways go on
            say(failed=way, why=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}")
            continue
        say(ready=way, seconds_to_ready=round(ways[way].ready, 1), parameters=ways[way].parameters,
            peak_bytes=ways[way].peak_bytes)
    say(prepared=True, torch=torch.__version__, cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(),
        device=torch.cuda.get_device_name())
    for line in sys.stdin:
        _, way, count = line.split()
        say(seconds=ways[way].seconds(int(count)), peak_bytes=ways[way].peak_bytes)


def say(**answer):
    print(json.dumps(answer), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--ways", default="eager,graphed,compiled")
    parser.add_argument("--serve", action="store_true")
    options = parser.parse_args()
    import torch
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.precision == "tf32"
    torch.backends.cudnn.benchmark = True
    if options.serve:
        return serve(torch, options)
    for name in options.ways.split(","):
        way = Way(torch, options, name)
        rate = 20 * options.batch / way.seconds(20)
        count = max(5, int(0.1 * rate / options.batch))
        rates, end = [], time.time() + options.seconds
        while time.time() < end or len(rates) < 3:
            rates.append(count * options.batch / way.seconds(count))
        say(model=options.model, peer=f"PyTorch {torch.__version__}", way=name, batch=options.batch,
            precision=options.precision, samples_per_second=round(statistics.median(rates)), rounds=len(rates),
            seconds_to_ready=round(way.ready, 1), peak_mib=way.peak_bytes >> 20,
            device=torch.cuda.get_device_name())
    return 0


if __name__ == "__main__":
    main()
