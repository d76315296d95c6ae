"""The peer on one GPU: whole training steps of PyTorch, in each of its ways to run them.

    torch_gpu.py MODEL [--batch N] [--precision fp32|tf32|bf16] [--seconds S] [--ways eager,graphed,compiled]

eager: a call for every kernel. graphed: the whole step, optimizer included, captured once as a CUDA graph and
replayed. compiled: torch.compile's kernels, and the whole step of them captured and replayed in the same way.
Prints a line of JSON for each: median samples/s over rounds of at least a tenth of a second. The data lie on the
GPU: nothing is read, decoded or shuffled.
"""
import argparse
import json
import os
import statistics
import sys
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import torch_train  # noqa: E402

BATCHES = 8


def resnet50():
    import torchvision
    return torchvision.models.resnet50(), (3, 224, 224)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--ways", default="eager,graphed,compiled")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.precision == "tf32"
    torch.backends.cudnn.benchmark = True
    makers = {**torch_train.models(torch), "resnet50": resnet50}
    for way in options.ways.split(","):
        torch.manual_seed(0)
        model, shape = makers[options.model]()
        classes = 1000 if options.model == "resnet50" else 10
        layout = torch.channels_last
        model = model.cuda().to(memory_format=layout)
        if way == "compiled":
            model = torch.compile(model)
        xs = [torch.randn(options.batch, *shape, device="cuda").contiguous(memory_format=layout)
              for _ in range(BATCHES)]
        ys = [torch.randint(0, classes, (options.batch,), device="cuda") for _ in range(BATCHES)]
        x, y = xs[0].clone(memory_format=torch.preserve_format), ys[0].clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)

        def step():
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=options.precision == "bf16"):
                loss = torch.nn.functional.cross_entropy(model(x).float(), y)
            loss.backward()
            optimizer.step()

        began = time.time()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(11):
                step()
        torch.cuda.current_stream().wait_stream(side)
        run = step
        if way != "eager":
            graph = torch.cuda.CUDAGraph()
            optimizer.zero_grad(set_to_none=True)
            with torch.cuda.graph(graph):
                step()
            run = graph.replay
        torch.cuda.synchronize()
        ready = time.time() - began

        def measure(count):
            start = time.perf_counter()
            for i in range(count):
                x.copy_(xs[i % BATCHES])
                y.copy_(ys[i % BATCHES])
                run()
            torch.cuda.synchronize()
            return count * options.batch / (time.perf_counter() - start)

        count = max(5, int(0.1 * measure(20) / options.batch))
        rates, end = [], time.time() + options.seconds
        while time.time() < end or len(rates) < 3:
            rates.append(measure(count))
        print(json.dumps({"model": options.model, "peer": f"PyTorch {torch.__version__}", "way": way,
                          "batch": options.batch, "precision": options.precision,
                          "samples_per_second": round(statistics.median(rates)), "rounds": len(rates),
                          "seconds_to_ready": round(ready, 1),
                          "peak_mib": torch.cuda.max_memory_allocated() >> 20,
                          "device": torch.cuda.get_device_name()}), flush=True)


if __name__ == "__main__":
    main()
