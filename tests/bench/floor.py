"""The arithmetic floor of training: what its matrix products take at the machine's peak."""
import json
import math
import os

from processes import Failed, output_of

TIMEOUT = 120  # seconds of one run of machine_bench


class Peaks:
    """What the cores reach, and how near to it the rows of training come. A floor is what the machine can do, and
    whatever disturbs it makes it slower, so the best of all times that it was measured counts, for all rows."""

    def __init__(self, report, bin_folder, cores, seconds):
        """seconds: of each figure each time."""
        self.report = report
        self.command = [os.path.join(bin_folder, "machine_bench"), str(cores), str(seconds)]
        self.best, self.judged, self.failed = {}, {}, False  # best: by kind, precision and threads

    def measure(self):
        if self.failed:
            return
        try:
            output = output_of(self.command, TIMEOUT)
        except Failed as failure:
            self.failed = True
            self.report.fail("machine", failure)
            return
        for line in output.splitlines():
            row = json.loads(line)
            key = row["what"], row.get("precision"), row["threads"]
            self.best[key] = max(self.best.get(key, 0), row["per_second"])

    def judge_later(self, name, precision, threads, flops_per_second):
        self.judged[name] = "gemm", precision, threads, flops_per_second

    def judge(self):
        for (what, precision, threads), best in self.best.items():
            name = "/".join(["machine", what] + ([precision] if precision else []) + [str(threads)])
            self.report.add(name, best / 1e9, "GFLOP/s" if what == "gemm" else "GB/s")
        for name, (*key, flops_per_second) in self.judged.items():
            if tuple(key) in self.best:  # the processor may lack bf16
                self.report.add_fraction(name, flops_per_second / self.best[tuple(key)])


def flops_of_step(explanation):
    """Of the products of one sample's training step: each forward, and backward into weights and inputs, but for the
    inputs of the first layer, which nobody needs. Products with the zeros of a padding are no work, and libraries
    skip them."""
    shapes = {"data": explanation["spec"]["data"]["shape"]}
    weights = {tensor["name"]: tensor["shape"] for tensor in explanation["tensors"]}
    total, unneeded = 0, None
    for layer in explanation["layers"]:
        name, shapes[layer["name"]] = layer["name"], layer["output"]
        of_input = shapes[layer["inputs"][0]]
        if layer["type"] == "dense":
            products = [math.prod(weights[f"{name}.weight"])]
        elif layer["type"] == "conv2d":
            filters, kernel, _, channels = weights[f"{name}.weight"]
            taps = [taps_inside(of_input[side], layer["output"][side], kernel) for side in (0, 1)]
            products = [filters * channels * math.prod(taps)]
        elif layer["type"] == "lstm":  # its second products have its own outputs as inputs
            products = [of_input[0] * math.prod(weights[f"{name}.weight_{kind}_l0"]) for kind in ("ih", "hh")]
        else:
            continue
        total += sum(products)
        if unneeded is None:
            unneeded = products[0]
    return 2 * (3 * total - unneeded)


def taps_inside(size, outputs, kernel):
    """Along one side of an image that is padded by half a kernel: how many places of the window, over all of its
    positions, lie inside."""
    stride = size // outputs
    return sum(0 <= position * stride + place - kernel // 2 < size
               for position in range(outputs) for place in range(kernel))
