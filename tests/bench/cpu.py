"""The CPU benchmark: Lockstep beside PyTorch, in turns, in one run. See run.sh for its use.

Rows, all with `ratio` above 1 where Lockstep is better and null where there is nothing to compare with:
  machine/gemm/P/T, machine/memcpy/T   what T cores at once reach
  train/M/P/WxS[/sync-batch]           samples/s of whole steps; peer: the best configuration of that precision;
                                       fraction_of_floor: of the cores' measured matrix peak
  peer/train/M/P/C                     each of the peer's configurations
  scaling/M/P/WxS                      1x2 as a multiple of 1x1, 2x1 of 1x2
  exactness/M/P/1x2                    percent that 8 canonical shards cost against one shard a slot (two leaves
                                       have one order of summing only)
  memory/M/P/WxS                       peak MB of all workers; peer: the smallest at that placement
  allreduce/LINK/N/SIZE/{latency,bandwidth}   peer: Gloo between N processes, also for threads
  start/{submit,run}-to-first-step     the latter starts a cluster; peer: a new Python, eager, 1x2
"""
import argparse
import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone

import peer
from own import Failed, Programs, last_line
from report import Report, markdown, put_into

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
BATCH, SHARDS = 128, 8
CONVOLUTIONAL = ("lenet", "resnet20")
MODELS = ("mlp", "lenet", "resnet20", "lstm")
PRECISIONS = ("fp32", "bf16")
PLACEMENTS = ((1, 1), (1, 2), (2, 1))  # workers, slots
SIZES = {1 << 10: "1KiB", 64 << 10: "64KiB", 1 << 20: "1MiB", 4 << 20: "4MiB", 64 << 20: "64MiB"}


class Scale:
    """How much is measured."""

    def __init__(self, quick):
        self.models = ("mlp",) if quick else MODELS
        self.rounds = 2 if quick else 3
        self.seconds = 0.4 if quick else 1.0  # of one measurement, start and warm-up not counted
        self.warmup = 5 if quick else 10  # steps
        self.fewest_steps = 3 if quick else 10
        self.batch_placements = ((1, 2),) if quick else PLACEMENTS
        self.machine_seconds = 0.1 if quick else 0.3
        self.reduce_rounds = 1 if quick else 3
        self.starts = 2 if quick else 5

    def steps(self, samples_per_second):
        return max(self.fewest_steps, int(self.seconds * samples_per_second / BATCH))


def placement_name(workers, slots):
    return f"{workers}x{slots}"


class Own:
    """One configuration of ours."""

    def __init__(self, programs, model, precision, workers, slots, sync=None, shards=None):
        self.programs, self.workers, self.slots = programs, workers, slots
        self.spec = os.path.join(HERE, "specs", f"{model}.yaml")
        self.overrides = [f"train.precision={precision}"] if precision != "fp32" else []
        self.overrides += [f"model.sync={sync}"] if sync else []
        self.overrides += [f"train.shards={shards}"] if shards else []
        self.name = f"{model}/{precision}/{placement_name(workers, slots)}"
        self.name += f"/sync-{sync}" if sync else ""
        self.name += f"/{shards} shards" if shards else ""

    def run(self, steps, warmup):
        return self.programs.train(self.spec, self.overrides, self.workers, self.slots, warmup + steps, warmup)


class Series:
    """A configuration's figures over the rounds; a failure ends it and is told once."""

    def __init__(self, report, name, measure, steps):
        self.report, self.name, self.measure, self.steps = report, name, measure, steps
        self.rates, self.peak, self.failed = [], 0, False

    def take(self, scale, count=True):
        if self.failed:
            return
        try:
            figures = self.measure(self.steps)
        except Failed as failure:
            self.fail(failure)
            return
        self.steps = scale.steps(figures["samples_per_second"])
        self.peak = max(self.peak, figures["peak_bytes"])
        if count:
            self.rates.append(figures["samples_per_second"])

    def fail(self, why):
        self.failed = True
        self.report.fail(self.name, why)

    def rate(self):
        return statistics.median(self.rates) if self.rates and not self.failed else None


def flops_of_step(explanation):
    """Of one sample's training step: each product forward, and backward into weights and inputs, but for the
    inputs of the first layer, which nobody needs."""
    layers = [layer for layer in explanation["layers"] if layer["type"] in ("dense", "conv2d", "lstm")]
    first = layers[0]
    unneeded = first["flops"]
    if first["type"] == "lstm":  # its recurrent products have inputs whose gradients are needed
        height, width, channels = explanation["spec"]["data"]["shape"]
        directions = 2 if explanation["spec"]["model"].get("bidirectional") else 1
        unneeded = 2 * height * width * channels * 4 * first["output"][-1]
        assert directions == 1, "the benchmark's LSTM has one direction"
    return 3 * sum(layer["flops"] for layer in layers) - unneeded


def measure_machine(report, scale, bin_folder, cores):
    """FLOP/s by precision and threads."""
    done = subprocess.run([os.path.join(bin_folder, "machine_bench"), str(cores), str(scale.machine_seconds)],
                          capture_output=True, text=True)
    if done.returncode != 0:
        report.fail("machine_bench", last_line(done.stderr))
    peaks = {}
    for line in done.stdout.splitlines():
        row = json.loads(line)
        if row["what"] == "gemm":
            peaks[row["precision"], row["threads"]] = row["per_second"]
            report.add(f"machine/gemm/{row['precision']}/{row['threads']}", row["per_second"] / 1e9, "GFLOP/s")
        else:
            report.add(f"machine/memcpy/{row['threads']}", row["per_second"] / 1e9, "GB/s")
    return peaks


def measure_training(report, scale, programs, torch, peaks, model, precision):
    explained = programs.explain(os.path.join(HERE, "specs", f"{model}.yaml"))
    flops = flops_of_step(explained)
    normed = any(layer["type"] == "batch_norm" for layer in explained["layers"])
    own = {}
    for workers, slots in PLACEMENTS:
        own[placement_name(workers, slots)] = Own(programs, model, precision, workers, slots)
    if normed:
        for workers, slots in scale.batch_placements:
            own[placement_name(workers, slots) + "/sync-batch"] = Own(programs, model, precision, workers, slots,
                                                                      sync="batch")
    own["1x2/2 shards"] = Own(programs, model, precision, 1, 2, shards=2)
    series = {key: Series(report, f"train/{one.name}", lambda steps, one=one: one.run(steps, scale.warmup),
                          2 * scale.fewest_steps) for key, one in own.items()}

    running, peers = [], {}
    try:
        for configuration in peer.configurations(model in CONVOLUTIONAL) if torch else []:
            name = peer.name(configuration)
            peers[name] = Series(report, f"peer {model} {precision} {name}", None, scale.fewest_steps)
            try:
                running.append(peer.Peer(model, precision, configuration, BATCH, scale.warmup))
                peers[name].measure = running[-1].measure
                peers[name].placement = "2x1" if configuration["ranks"] > 1 else "1x2"
            except Failed as failure:
                peers[name].fail(failure)
        ours, theirs = list(series.values()), list(peers.values())
        for round_number in range(scale.rounds + 1):  # the first one only tells how many steps to take
            for i in range(max(len(ours), len(theirs))):
                for side in (ours, theirs):
                    if i < len(side):
                        side[i].take(scale, count=round_number > 0)
    finally:
        for one in running:
            one.close()

    for name, one in peers.items():
        report.add(f"peer/train/{model}/{precision}/{name.replace(' ', '-')}", one.rate(), "samples/s")
    ran = {name: one.rate() for name, one in peers.items() if one.rate() is not None}
    best = max(ran, key=ran.get) if ran else None
    for key, one in series.items():
        if key == "1x2/2 shards":
            continue
        cores = own[key].workers * own[key].slots
        peak = peaks.get((precision, cores))
        fraction = one.rate() * flops / peak if one.rate() and peak else None
        report.add(f"train/{model}/{precision}/{key}", one.rate(), "samples/s", best, ran.get(best), fraction)
    for key, other, text in (("1x2", "1x1", "times 1x1"), ("2x1", "1x2", "times 1x2")):
        if series[key].rate() and series[other].rate():
            report.add(f"scaling/{model}/{precision}/{key}", series[key].rate() / series[other].rate(), text)
    if series["1x2"].rate() and series["1x2/2 shards"].rate():
        price = 100 * (1 - series["1x2"].rate() / series["1x2/2 shards"].rate())
        report.add(f"exactness/{model}/{precision}/1x2", price, "%")
    for workers, slots in PLACEMENTS:
        key = placement_name(workers, slots)
        if series[key].rate() is None:
            continue
        beside = {name: one.peak / 1e6 for name, one in peers.items() if one.rate() and one.placement == key}
        smallest = min(beside, key=beside.get) if beside else None
        report.add(f"memory/{model}/{precision}/{key}", series[key].peak / 1e6, "MB", smallest,
                   beside.get(smallest), less_is_better=True)


def measure_all_reduce(report, scale, torch, bin_folder):
    own, beside = {}, {}
    for _ in range(scale.reduce_rounds):
        for members in (2, 4):
            for link in ("processes", "threads"):
                done = subprocess.run([os.path.join(bin_folder, "allreduce_bench"), link, str(members)],
                                      capture_output=True, text=True)
                if done.returncode != 0:
                    report.fail(f"all-reduce of {members} {link}", last_line(done.stderr))
                    continue
                for line in done.stdout.splitlines():
                    row = json.loads(line)
                    own.setdefault((link, members, row["bytes"]), []).append(row["us"] * 1e-6)
            if not torch:
                continue
            try:
                for size, seconds in peer.all_reduce(members).items():
                    beside.setdefault((members, size), []).append(seconds)
            except Failed as failure:
                report.fail("peer", failure)
    for (link, members, size), times in own.items():
        seconds = statistics.median(times)
        its = statistics.median(beside[members, size]) if (members, size) in beside else None
        name = f"allreduce/{link}/{members}/{SIZES[size]}"
        moved = 2 * (members - 1) / members * size / 1e9
        report.add(f"{name}/latency", seconds * 1e6, "us", "Gloo" if its else None, its and its * 1e6,
                   less_is_better=True)
        report.add(f"{name}/bandwidth", moved / seconds, "GB/s", "Gloo" if its else None, its and moved / its)


def measure_start(report, scale, programs, torch):
    spec = os.path.join(HERE, "specs", "mlp.yaml")
    submits, runs, peers = [], [], []
    eager = {"compiled": False, "channels_last": False, "ranks": 1, "threads": 2}
    try:
        for _ in range(scale.starts):
            submits.append(programs.submit_to_first_step(spec, []))
            runs.append(programs.train(spec, [], 1, 2, scale.warmup + 1, scale.warmup)["first_step_seconds"])
            if torch:
                one = peer.Peer("mlp", "fp32", eager, BATCH, scale.warmup)
                peers.append(one.first_step_seconds)
                one.close()
    except Failed as failure:
        report.fail("start", failure)
    if submits:
        report.add("start/submit-to-first-step", statistics.median(submits), "s")
    if runs:
        report.add("start/run-to-first-step", statistics.median(runs), "s", "a new Python, eager 1x2" if peers else None,
                   statistics.median(peers) if peers else None, less_is_better=True)


def machine_line(options, scale, programs, torch, cores, utc):
    def read(path, key):
        with open(path) as file:
            for line in file:
                if line.startswith(key):
                    return line.split(":", 1)[1].strip()
        return ""

    def output(*command):
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()
        except OSError:
            return ""

    return {"name": "machine", "utc": utc, "cpu": read("/proc/cpuinfo", "model name"), "cores": cores,
            "isa": sorted(flag for flag in read("/proc/cpuinfo", "flags").split()
                          if flag in ("avx2", "fma") or flag.startswith(("avx512", "amx"))),
            "memory": read("/proc/meminfo", "MemTotal"), "kernel": platform.release(), "load": os.getloadavg(),
            "lockstep": programs.version(), "commit": output("git", "describe", "--always", "--dirty"),
            "onednn": output("dpkg-query", "-W", "-f", "${Version}", "libdnnl2"),
            "compiler": output("c++", "--version").split("\n")[0], "python": platform.python_version(),
            "torch": torch, "command": options.command, "rounds": scale.rounds, "batch": BATCH, "shards": SHARDS}


def main():
    parser = argparse.ArgumentParser(description="The CPU benchmark.")
    parser.add_argument("--quick", action="store_true", help="one model and short rounds, for a look")
    parser.add_argument("--readme", action="store_true", help="put the table between the README's markers")
    parser.add_argument("--bin", default=os.path.join(ROOT, "build", "bin"), help="folder of the programs")
    parser.add_argument("--models", help="only these, with commas between them")
    options = parser.parse_args()
    options.command = shlex.join(["bash", "tests/bench/run.sh", "cpu", *sys.argv[1:]])
    scale = Scale(options.quick)
    if options.models:
        scale.models = tuple(options.models.split(","))
        unknown = set(scale.models) - set(MODELS)
        if unknown:
            parser.error(f"no model {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    cores = len(os.sched_getaffinity(0))
    if cores < 2:
        parser.error("the benchmark compares two slots with two threads and needs two cores")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what was started
    began, now = time.time(), datetime.now(timezone.utc)
    torch = peer.version()
    results = os.path.join(HERE, "results")
    os.makedirs(results, exist_ok=True)
    report = Report(os.path.join(results, f"cpu-{now:%Y%m%dT%H%M%SZ}.jsonl"))
    if torch is None:
        print("python3 has no torch: the columns of the peer stay empty", file=sys.stderr)
    if os.getloadavg()[0] > 0.5:
        print(f"the machine is busy (load {os.getloadavg()[0]:.1f}): figures will be wrong", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="lockstep-bench-") as folder:
        programs = Programs(options.bin, folder)
        machine = machine_line(options, scale, programs, torch, cores, f"{now:%Y-%m-%dT%H:%M:%SZ}")
        report.write(machine)
        peaks = measure_machine(report, scale, options.bin, 2)
        for model in scale.models:
            for precision in PRECISIONS:
                try:
                    measure_training(report, scale, programs, torch, peaks, model, precision)
                except Failed as failure:  # the program does not know the model yet
                    report.fail(f"train/{model}/{precision}", failure)
                    for workers, slots in PLACEMENTS:
                        report.add(f"train/{model}/{precision}/{placement_name(workers, slots)}", None, "samples/s")
        measure_all_reduce(report, scale, torch, options.bin)
        measure_start(report, scale, programs, torch)
    text = markdown(report.rows, machine, scale.models)
    print(text)
    if options.readme and not put_into(os.path.join(ROOT, "README.md"), text):
        report.fail("--readme", "README.md has no <!-- bench --> and <!-- /bench -->")
    report.close()
    print(f"\n{len(report.rows)} rows in {os.path.relpath(report.path, os.getcwd())} after "
          f"{(time.time() - began) / 60:.1f} minutes", file=sys.stderr)
    if report.failures:
        print(f"{len(report.failures)} failed:\n  " + "\n  ".join(report.failures), file=sys.stderr)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
