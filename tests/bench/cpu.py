"""The CPU benchmark: Lockstep beside PyTorch, in turns, in one run. See run.sh for its use.

Rows, all with `ratio` above 1 where Lockstep is better and null where there is nothing to compare with:
  machine/gemm/P/T, machine/memcpy/T   what T cores at once reach: the best of all rounds
  train/M/P/WxS[/sync-batch]           samples/s of whole steps; peer: the best configuration of that precision;
                                       fraction_of_floor: of the cores' matrix peak; above 1 it fails the benchmark
  peer/train/M/P/C                     each of the peer's configurations
  scaling/M/P/WxS                      1x2 as a multiple of 1x1, 2x1 of 1x2
  exactness/M/P/1x2                    percent of samples/s that 8 shards and their canonical tree cost against one
                                       shard a slot (see below)
  price/digests/M                      percent of samples/s that digests of every step, the default, cost; fp32, 1x2
  memory/M/P/WxS                       peak MB of all processes of a run: client, coordinator and workers; peer: all
                                       ranks of the smallest configuration at that placement
  allreduce/LINK/N/SIZE/{latency,bandwidth}   peer: Gloo between N processes, also for threads
  start/{submit,run}-to-first-step     until the first step has ended; `run` starts a cluster first; peer: the same of
                                       a new Python, eager, 1x2

Values are medians over the rounds. The host's speed drifts by more than most of what is compared, so a ratio of two
configurations (scaling/, exactness/, price/ and the `ratio` of train/ and start/) is the median of their ratios within
the rounds: of two runs one directly after the other where the order of a round has them so, else of the same round.

The price of exactness: one shard a slot leaves two gradients to add. a + b has one order only, so that sum is the
order-free sum, and 1x2 with 2 shards is what it is compared with. What the tree costs comes with a second effect there:
a slot works in portions of a shard, and those of 8 shards stay in its caches. No spec has small portions without a tree
(those of `accumulate` are leaves of it, too), so the effects cannot be told apart by whole steps; the rows
DenseGradient of kernels_bench have the tree's work by itself.
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
from itertools import zip_longest

import peer
from floor import Peaks, flops_of_step
from own import Programs
from processes import Failed, output_of
from report import Report, markdown, put_into
from turns import Turns

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
BATCH, SHARDS = 128, 8
CONVOLUTIONAL = ("lenet", "resnet20")
MODELS = ("mlp", "lenet", "resnet20", "lstm")
PRECISIONS = ("fp32", "bf16")
PLACEMENTS = ((1, 1), (1, 2), (2, 1))  # workers, slots
ONE_SHARD, DIGESTS = "1x2/one shard a slot", "1x2/digests of every step"
ALL_REDUCE_TIMEOUT = 600  # seconds of all sizes between some members
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
        self.machine_seconds = 0.1 if quick else 0.2  # of each figure of a round
        self.reduce_rounds = 1 if quick else 3
        self.starts = 2 if quick else 5

    def steps(self, samples_per_second):
        return max(self.fewest_steps, int(self.seconds * samples_per_second / BATCH))


def placement_name(workers, slots):
    return f"{workers}x{slots}"


def spec_of(model):
    return os.path.join(HERE, "specs", f"{model}.yaml")


class Own:
    """One configuration of ours."""

    def __init__(self, programs, model, precision, workers, slots, *overrides):
        self.programs, self.workers, self.slots = programs, workers, slots
        self.spec = spec_of(model)
        self.overrides = [f"train.precision={precision}", *overrides]

    def run(self, steps, warmup):
        return self.programs.train(self.spec, self.overrides, self.workers, self.slots, warmup + steps, warmup)


def own_configurations(programs, scale, model, precision, explained):
    """By name; those of PLACEMENTS first."""
    own = {placement_name(*placement): Own(programs, model, precision, *placement) for placement in PLACEMENTS}
    # A preset's norms have one field, those of a list of layers one each.
    layers = explained["spec"]["model"]["layers"]
    norms = [f"model.layers.{i}.sync=batch" for i, layer in enumerate(layers) if layer["type"] == "batch_norm"]
    if any(layer["type"] == "batch_norm" for layer in explained["layers"]):
        for placement in scale.batch_placements:
            own[placement_name(*placement) + "/sync-batch"] = Own(programs, model, precision, *placement,
                                                                  *(norms or ["model.sync=batch"]))
    own[ONE_SHARD] = Own(programs, model, precision, 1, 2, "train.shards=2")
    if precision == "fp32":
        own[DIGESTS] = Own(programs, model, precision, 1, 2, "train.digest_every=1")
    return own


def start_peers(turns, running, model, precision, parameters, warmup):
    """Adds the peer's configurations to the turns, and those that run to `running`. Their names and placements."""
    peers = {}
    for configuration in peer.configurations(model in CONVOLUTIONAL):
        name = peer.name(configuration)
        peers[name] = "2x1" if configuration["ranks"] > 1 else "1x2"
        turns.add(name, None)
        try:
            running.append(peer.Peer(model, precision, configuration, BATCH, warmup))
            if running[-1].parameters != parameters:
                raise Failed(f"{running[-1].parameters} parameters, and ours has {parameters}")
            turns.measures[name] = running[-1].measure
        except Failed as failure:
            turns.fail(name, failure)
    return peers


def order_of_round(own, peers):
    """`peers` from the fastest. What is compared closely stands side by side; the rest, ours and the peer's, in
    turns."""
    first = ["1x1", "1x2", "2x1"]
    last = [ONE_SHARD, "1x2", *peers[:1], "1x2"] + ([DIGESTS] if DIGESTS in own else [])
    ours, theirs = [name for name in own if name not in first + last], peers[1:]
    between = [name for pair in zip_longest(ours, theirs) for name in pair if name is not None]
    return first + between + last


def measure_training(report, scale, programs, torch, peaks, model, precision):
    explained = programs.explain(spec_of(model))
    own = own_configurations(programs, scale, model, precision, explained)
    turns = Turns(report, scale.rounds, scale.steps, f"{model}/{precision}")
    for name, one in own.items():
        turns.add(name, lambda steps, one=one: one.run(steps, scale.warmup))
    running, peers = [], {}
    try:
        if torch:
            peers = start_peers(turns, running, model, precision, explained["parameters"], scale.warmup)
        turns.take([*own, *peers])
        by_speed = sorted(peers, key=lambda name: max(turns.rates(name, [None]), default=0), reverse=True)
        for round_number in range(scale.rounds):
            peaks.measure()
            turns.take(order_of_round(own, by_speed), round_number)
    finally:
        for one in running:
            one.close()

    for name in peers:
        report.add(f"peer/train/{model}/{precision}/{name.replace(' ', '-')}", turns.rate(name), "samples/s")
    best = max((name for name in peers if turns.rate(name)), key=turns.rate, default=None)
    flops = flops_of_step(explained)
    for key, one in own.items():
        if key in (ONE_SHARD, DIGESTS):
            continue
        name, rate = f"train/{model}/{precision}/{key}", turns.rate(key)
        report.add(name, rate, "samples/s", best, best and turns.rate(best), best and turns.ratio(key, best))
        if rate:
            peaks.judge_later(name, precision, one.workers * one.slots, rate * flops)
    for key, other in (("1x2", "1x1"), ("2x1", "1x2")):
        report.add(f"scaling/{model}/{precision}/{key}", turns.ratio(key, other), f"times {other}")
    report.add(f"exactness/{model}/{precision}/1x2", price(turns.ratio("1x2", ONE_SHARD)), "%")
    if DIGESTS in own:
        report.add(f"price/digests/{model}", price(turns.ratio(DIGESTS, "1x2")), "%")
    for placement in PLACEMENTS:
        key = placement_name(*placement)
        beside = {name: turns.memory[name] / 1e6 for name in peers if peers[name] == key and turns.rate(name)}
        smallest = min(beside, key=beside.get, default=None)
        report.add(f"memory/{model}/{precision}/{key}", turns.memory[key] / 1e6 if turns.rate(key) else None, "MB",
                   smallest, beside.get(smallest), less_is_better=True)


def price(ratio):
    """In percent, of what has this ratio to that without."""
    return None if ratio is None else 100 * (1 - ratio)


def measure_all_reduce(report, scale, torch, bin_folder):
    own, beside = {}, {}
    for _ in range(scale.reduce_rounds):
        for members in (2, 4):
            for link in ("processes", "threads"):
                try:
                    output = output_of([os.path.join(bin_folder, "allreduce_bench"), link, str(members)],
                                       ALL_REDUCE_TIMEOUT)
                except Failed as failure:
                    report.fail(f"all-reduce of {members} {link}", failure)
                    continue
                for line in output.splitlines():
                    row = json.loads(line)
                    own.setdefault((link, members, row["bytes"]), []).append(row["us"] * 1e-6)
            if not torch:
                continue
            try:
                for size, seconds in peer.all_reduce(members).items():
                    beside.setdefault((members, size), []).append(seconds)
            except Failed as failure:
                report.fail(f"peer's all-reduce of {members}", failure)
    for (link, members, size), times in own.items():
        seconds = statistics.median(times)
        its = statistics.median(beside[members, size]) if (members, size) in beside else None
        name = f"allreduce/{link}/{members}/{SIZES[size]}"
        moved = 2 * (members - 1) / members * size / 1e9
        report.add(f"{name}/latency", seconds * 1e6, "us", "Gloo" if its else None, its and its * 1e6,
                   less_is_better=True)
        report.add(f"{name}/bandwidth", moved / seconds, "GB/s", "Gloo" if its else None, its and moved / its)


def first_step_of_peer():
    configuration = {"compiled": False, "channels_last": False, "ranks": 1, "threads": 2}
    one = peer.Peer("mlp", "fp32", configuration, BATCH, 0)
    one.close()
    return one.first_step_seconds


def measure_start(report, scale, programs, torch):
    spec = spec_of("mlp")
    measures = {"submit": lambda: programs.submit_to_first_step(spec, 2),
                "run": lambda: programs.run_to_first_step(spec, 1, 2)}
    if torch:
        measures["peer"] = first_step_of_peer
    seconds = {name: [] for name in measures}
    for _ in range(scale.starts):
        for name in list(measures):
            try:
                seconds[name].append(measures[name]())
            except Failed as failure:
                report.fail(f"start {name}", failure)
                del measures[name], seconds[name]
    middle = {name: statistics.median(taken) for name, taken in seconds.items()}
    ratio = None
    if "run" in seconds and "peer" in seconds:
        ratio = statistics.median(its / ours for ours, its in zip(seconds["run"], seconds["peer"]))
    report.add("start/submit-to-first-step", middle.get("submit"), "s")
    name = "a new Python, eager 1x2" if "peer" in middle else None
    report.add("start/run-to-first-step", middle.get("run"), "s", name, middle.get("peer"), ratio, less_is_better=True)


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
    try:
        torch = peer.version()
    except Failed as failure:
        parser.exit(1, f"the torch of {sys.executable} cannot be imported: {failure}\n")
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
        peaks = Peaks(report, options.bin, 2, scale.machine_seconds)
        for model in scale.models:
            for precision in PRECISIONS:
                try:
                    measure_training(report, scale, programs, torch, peaks, model, precision)
                except Failed as failure:
                    report.fail(f"train/{model}/{precision}", failure)
                    for placement in PLACEMENTS:
                        report.add(f"train/{model}/{precision}/{placement_name(*placement)}", None, "samples/s")
        measure_all_reduce(report, scale, torch, options.bin)
        measure_start(report, scale, programs, torch)
        peaks.judge()
    text = markdown(report.rows, machine, scale.models)
    print(text)
    if options.readme and report.failures:
        print("README.md stays as it is, since not everything ran", file=sys.stderr)
    elif options.readme and not put_into(os.path.join(ROOT, "README.md"), text):
        report.fail("--readme", "README.md has no <!-- bench --> and <!-- /bench -->")
    report.close()
    print(f"\n{len(report.rows)} rows in {os.path.relpath(report.path, os.getcwd())} after "
          f"{(time.time() - began) / 60:.1f} minutes", file=sys.stderr)
    if report.failures:
        print(f"{len(report.failures)} failed:\n  " + "\n  ".join(report.failures), file=sys.stderr)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
