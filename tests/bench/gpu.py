"""The GPU benchmark: Lockstep beside PyTorch on one GPU, in turns, in one run. See run.sh for its use.

Rows, all with `ratio` above 1 where Lockstep is better and null where there is nothing to compare with:
  gpu/copy/HOW, gpu/product/P      what the GPU reaches (gpu_floor.cu)
  gpu/launch/HOW                   microseconds of a kernel that does nothing, launched again and again
  gpu/small_product/NAME           microseconds of our product of a small layer; peer: cuBLASLt's
  gpu/kernel/NAME                  GB/s of our kernels whose time is that of moving bytes; fraction_of_floor: of a copy
  train/M/B/P/S                    samples/s of whole steps of model M with batch B in precision P and S shards, on one
                                   slot; peer: PyTorch's best way of that precision; fraction_of_floor: of the matrix
                                   peak in that precision
  peer/train/M/B/P/WAY             each of PyTorch's ways (torch_gpu.py)
  host/M/B/P                       percent of the time that the thread of the slot, 8 shards, is not on a processor
  exactness/M/B/P                  percent of samples/s that 8 shards and their canonical tree cost against one shard,
                                   whose gradient has no second one to be added to
  early/M/B/P                      with --early: percent of samples/s that 8 shards gain by kernels that are put on the
                                   multiprocessors before the one before has ended
  memory/M/B/P/S                   peak MB of GPU memory: ours of the whole process, its context included, as nvidia-smi
                                   shows it; PyTorch's of its tensors
  trace/M/B/P/CLASS                with --trace: percent of the time of 8 shards' steps that each class of kernels takes
                                   (a source file of ours, or a library), and `gaps`, in which none runs; of a run of
                                   its own, without that, which CUPTI slows down a little (gpu_trace.cc)

Values are medians over the rounds, ratios medians of the ratios within the rounds, of two measurements one directly
after the other. PyTorch's ways are prepared before anything is measured, compilation included, and sleep while others
are measured; those of resnet50, which take tens of GB each, by themselves, or with --together with the others'. What
--limit leaves no time for is told and not measured.
"""
import argparse
import contextlib
import csv
import glob
import importlib.util
import json
import os
import re
import selectors
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime, timezone

from floor import flops_of_step
from own import Programs
from processes import Failed, children_of, last_line, output_of
from report import Report, number, table
from turns import Turns

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
FASHION = "/usr/share/datasets/fashion-mnist"
# model: batches, precisions, spec, whether it reads images of 28 x 28
MODELS = {
    "mlp": ((128,), ("fp32", "bf16"), "tests/bench/specs/mlp.yaml", True),
    "lenet": ((128,), ("fp32", "bf16"), "tests/bench/specs/lenet.yaml", True),
    "lstm": ((128,), ("fp32", "bf16"), "tests/bench/specs/lstm.yaml", True),
    "resnet20": ((128, 1024), ("fp32", "bf16"), "tests/bench/specs/resnet20.yaml", False),
    "resnet50": ((256,), ("bf16", "tf32"), "deploy/jobs/resnet50-synthetic.yaml", False),
}
SHARDS = (8, 1)
START_SECONDS = 60  # of a run of ours, all that is not a step
FLOOR_SECONDS = 120
SLOWEST_STEP = 1.0  # seconds
PREPARE_SECONDS = 300
TRACED_STEPS = 200
# In the name of a kernel of ours is that of its source.
OWN_KERNEL = re.compile(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_[0-9a-f]{8}(\d+)")
LIBRARIES = (("cuDNN", re.compile("cudnn|fprop|dgrad|wgrad|nchw|nhwc", re.IGNORECASE)),
             ("cuBLASLt", re.compile("gemm|cutlass|xmma|nvjet|splitk|cublas", re.IGNORECASE)))
# Models each of whose PyTorch processes lives by itself.
ALONE = ("resnet50",)
LATE = {"LOCKSTEP_CUDA_EARLY_LAUNCH": "0"}


class Memory:
    """What the GPU's memory holds, all processes together, looked at all the time."""

    def __init__(self):
        self.samples, self.process = [], None
        try:
            self.process = subprocess.Popen(
                ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0", "-lms", "50"],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            return
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            if line.strip().isdigit():
                self.samples.append((time.time(), int(line) << 20))

    def now(self):
        return self.samples[-1][1] if self.samples else 0

    def peak_since(self, start):
        return max((used for at, used in list(self.samples) if at >= start), default=0)

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def changed_environment(changes):
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def busy_of_slot(process):
    """Seconds on a processor of the first slot's thread of a worker; None where there is none."""
    for task in glob.glob(f"/proc/{process}/task/*"):
        try:
            with open(f"{task}/comm") as name, open(f"{task}/schedstat") as times:
                if name.read().strip() == "slot 0":
                    return int(times.read().split()[0]) / 1e9
        except (OSError, ValueError, IndexError):
            continue
    return None


class Own(Programs):
    """Runs of ours on the GPU."""

    def __init__(self, folder, memory):
        bundled = os.path.exists(os.path.join(ROOT, "BUILD"))
        super().__init__(os.path.join(ROOT, "bin" if bundled else "build/bin"), folder)
        self.memory = memory
        self.libexec = os.path.join(ROOT, "libexec" if bundled else "build/bin")
        self.idle = None  # percent, of the last run

    def doctor(self):
        return json.loads(output_of([self._path("lockstep"), "doctor", "-o", "json"], START_SECONDS))["cuda"]

    def run_steps(self, spec, overrides, steps):
        """Steady samples/s by the clock from the end of the warm-up, within which steps are recorded and the host gets
        ahead of them, to that of the last step; waiting for data and reports are within it, the evaluation and the
        checkpoint at the end are not."""
        warmup = max(20, min(100, steps // 4))
        out, base, start, busy = self._folder(), self.memory.now(), time.time(), []

        def look(pid):
            for one in children_of(pid):
                seconds = busy_of_slot(one)
                if seconds is not None:
                    busy.append((time.time(), seconds))
        self._run(spec, [f"train.steps={steps + warmup}", "resources.device=cuda", *overrides], 1, 1, out,
                  START_SECONDS + SLOWEST_STEP * (steps + warmup), 0.02, look)
        if len(busy) >= 8:  # the middle half: steps alone
            (began, before), (ended, after) = busy[len(busy) // 4], busy[len(busy) * 3 // 4]
            self.idle = 100 * (1 - (after - before) / (ended - began))
        with open(os.path.join(out, "metrics.csv")) as file:
            rows = [row for row in csv.DictReader(file) if row["samples"]]
        if len(rows) != steps + warmup:
            raise Failed(f"metrics.csv has {len(rows)} steps of {steps + warmup}")
        times = [float(row["seconds"]) for row in rows]
        # The host hears of some steps at once; that is when the last of them ended.
        while warmup < len(rows) - 1 and times[warmup] - times[warmup - 1] < (times[-1] - times[warmup]) / steps / 4:
            warmup += 1
        seconds = times[-1] - times[warmup - 1]
        samples = sum(int(row["samples"]) for row in rows[warmup:])
        peak = max(0, self.memory.peak_since(start) - base) if base or self.memory.samples else 0
        return {"samples_per_second": samples / seconds, "peak_bytes": peak}


def class_of(kernel):
    """Of a mangled name: its class and a short name."""
    own = OWN_KERNEL.search(kernel)
    if own:
        rest = kernel[own.end():]
        return f"{own[1]}.cu", rest[:int(own[2])]
    for library, pattern in LIBRARIES:
        if pattern.search(kernel):
            return library, kernel[:60]
    return "other", kernel[:60]


def shares_of(path):
    """Of the middle of a trace (gpu_trace.cc), percent of the time by class and by kernel, and of gaps."""
    with open(path) as file:
        records = sorted((int(begin), int(end), name) for begin, end, name in
                         (line.rstrip("\n").split(" ", 2) for line in file if line.count(" ") >= 2))
    middle = records[len(records) * 2 // 5:len(records) * 4 // 5]
    if len(middle) < 20:
        raise Failed(f"the trace has {len(records)} kernels")
    span = middle[-1][0] - middle[0][0]
    classes, kernels, busy, until = {}, {}, 0, middle[0][0]
    for begin, end, name in middle[:-1]:
        alone = max(0, min(end, middle[-1][0]) - max(begin, until))  # not beside one that began earlier
        until = max(until, end)
        busy += alone
        kind, short = class_of(name)
        classes[kind] = classes.get(kind, 0) + alone
        kernels[short] = kernels.get(short, 0) + alone
    classes["gaps"] = span - busy
    return ({kind: 100 * time / span for kind, time in sorted(classes.items(), key=lambda one: -one[1])},
            {name: round(100 * time / span, 2) for name, time in sorted(kernels.items(), key=lambda one: -one[1])[:12]},
            len(records))


class Peer:
    """torch_gpu.py --serve of one model, batch and precision. `ways`: those that could be prepared, what they said."""

    def __init__(self, model, batch, precision, ways, folder):
        self.batch, self.ways, self.failed, self.torch = batch, {}, {}, {}
        self.errors = open(os.path.join(folder, f"torch-{model}-{batch}-{precision}"), "w+")
        environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "2"}
        self.process = subprocess.Popen(
            [sys.executable, os.path.join(HERE, "torch_gpu.py"), model, "--batch", str(batch), "--precision", precision,
             "--ways", ",".join(ways), "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            env=environment, bufsize=0)  # what lies in a buffer of ours, select does not see

    def _answer(self, timeout):
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            deadline = time.time() + timeout
            while selector.select(max(0, deadline - time.time())):
                line = self.process.stdout.readline()
                if not line:
                    self.errors.seek(0)
                    raise Failed(f"PyTorch ended with {self.process.wait()}: {last_line(self.errors.read())}")
                if line.startswith(b"{"):  # a library may talk
                    return json.loads(line)
        raise Failed(f"PyTorch gave no answer within {timeout:.0f} s")

    def prepare(self, timeout):
        deadline = time.time() + timeout
        while True:
            answer = self._answer(max(0.1, deadline - time.time()))
            if "prepared" in answer:
                self.torch = answer
                return
            if "failed" in answer:
                self.failed[answer["failed"]] = answer["why"]
            else:
                self.ways[answer["ready"]] = answer

    def measure(self, way, steps):
        try:
            self.process.stdin.write(f"measure {way} {steps}\n".encode())
            self.process.stdin.flush()
        except OSError:
            pass  # it died, and says why where its answer is read
        answer = self._answer(START_SECONDS + SLOWEST_STEP * steps)
        return {"samples_per_second": steps * self.batch / answer["seconds"], "peak_bytes": answer["peak_bytes"]}

    def close(self):
        try:
            self.process.stdin.close()
        except OSError:
            pass
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()


class Benchmark:
    def __init__(self, options, report, own):
        self.options, self.report, self.own = options, report, own
        self.deadline = time.time() + options.limit
        self.floor, self.kernels, self.rows, self.traces, self.torch = {}, [], [], [], None
        self.with_torch = importlib.util.find_spec("torch") is not None and options.ways != [""]

    def libraries(self):
        """NVIDIA's, where `lockstep doctor` finds them."""
        doctor = self.own.doctor()
        folders = [os.path.dirname(one["path"]) for one in doctor["libraries"] if one["path"].startswith("/")]
        return ":".join(dict.fromkeys(folders + doctor["folders"]))

    def measure_floor(self):
        program = os.path.join(self.own.libexec, "gpu_floor")
        try:
            output = output_of(["env", f"LD_LIBRARY_PATH={self.libraries()}", program], FLOOR_SECONDS)
        except (Failed, OSError) as failure:
            self.report.fail("gpu_floor", failure)
            return
        for line in output.splitlines():
            row = json.loads(line)
            if row["what"] == "copy":
                self.floor["copy"] = max(self.floor.get("copy", 0), row["gb_per_second"])
                self.report.add(f"gpu/copy/{row['how']}", row["gb_per_second"], "GB/s")
            elif row["what"] == "product":
                self.floor[row["precision"]] = row["tflops"]
                self.report.add(f"gpu/product/{row['precision']}", row["tflops"], "TFLOP/s")
            elif row["what"] == "launch":
                self.report.add(f"gpu/launch/{row['how']}", row["us"], "us")
            elif row["what"] == "small product":
                self.report.add(f"gpu/small_product/{row['name']}", row["us"], "us", "cublaslt", row["vendor_us"],
                                less_is_better=True)
            else:
                name = f"gpu/kernel/{row['name']}"
                self.report.add(name, row["gb_per_second"], "GB/s")
                # Caches may hold a part: above 1 is no error.
                self.report.rows[name]["fraction_of_floor"] = row["of_copy"]
                self.report.rows[name]["shape"] = row["shape"]
                self.kernels.append(row)

    def configurations(self):
        for model in self.options.models:
            batches, precisions, spec, images = MODELS[model]
            for batch in batches:
                for precision in precisions:
                    if not self.options.precisions or precision in self.options.precisions:
                        yield model, batch, precision, os.path.join(ROOT, spec), images

    def groups(self):
        together = [one for one in self.configurations() if one[0] not in ALONE]
        if self.options.together:
            return [list(self.configurations())]
        return ([together] if together else []) + [[one] for one in self.configurations() if one[0] in ALONE]

    def measure(self):
        for group in self.groups():
            if time.time() > self.deadline:
                self.leave_out(group)
                continue
            peers = {}
            try:
                if self.with_torch:
                    for model, batch, precision, _, _ in group:
                        ways = [way for way in self.options.ways if not (way == "eager" and model in ALONE)]
                        peers[model, batch, precision] = Peer(model, batch, precision, ways, self.own.folder)
                    self.prepare(peers)
                for at, one in enumerate(group):
                    if time.time() > self.deadline:
                        self.leave_out(group[at:])
                        break
                    self.measure_one(*one, peers.get(one[:3]))
                    if one[:3] in peers:
                        peers.pop(one[:3]).close()
            finally:
                for peer in peers.values():
                    peer.close()

    def leave_out(self, group):
        for model, batch, precision, _, _ in group:
            print(f"  not measured, no time was left: {model}/{batch}/{precision}", file=sys.stderr, flush=True)

    def prepare(self, peers):
        deadline = min(time.time() + PREPARE_SECONDS, max(self.deadline, time.time() + 30))
        for key, peer in list(peers.items()):
            title = "/".join(map(str, key))
            try:
                peer.prepare(deadline - time.time())
            except Failed as failure:
                self.report.fail(f"peer/{title}", failure)
                peer.process.kill()
                peers.pop(key).close()
                continue
            self.torch = peer.torch
            for way, why in peer.failed.items():
                self.report.fail(f"peer/{title}/{way}", why)
            print(f"  prepared PyTorch {title}: " + ", ".join(
                f"{way} in {answer['seconds_to_ready']} s" for way, answer in peer.ways.items()),
                file=sys.stderr, flush=True)

    def data(self, images):
        if not images or os.path.isdir(FASHION):
            return []
        if os.path.isdir(os.path.join(os.environ.get("LOCKSTEP_DATA", "/nowhere"), "mnist")):
            return ["data.path=mnist"]
        return ["data={format: synthetic, shape: [28, 28, 1], train_samples: 60000, validation_samples: 128}"]

    def measure_one(self, model, batch, precision, spec, images, peer):
        title = f"{model}/{batch}/{precision}"
        overrides = [*self.data(images), f"train.batch={batch}", f"train.precision={precision}"]
        try:
            explained = self.own.explain(spec, [*overrides, "resources.device=cuda"])
        except Failed as failure:
            self.report.fail(f"train/{title}", failure)
            return

        def steps_at(samples_per_second):
            return max(10, int(self.options.seconds * samples_per_second / batch))
        turns = Turns(self.report, self.options.rounds, steps_at, title)
        own = {shards: f"{shards} shard{'s' if shards > 1 else ''}" for shards in SHARDS}
        idle = []

        def run(steps, shards):
            figures = self.own.run_steps(spec, [*overrides, f"train.shards={shards}"], steps)
            if shards == 8 and self.own.idle is not None:
                idle.append(self.own.idle)
            return figures
        for shards, name in own.items():
            turns.add(name, lambda steps, shards=shards: run(steps, shards))

        def run_in_turn(steps):
            with changed_environment(LATE):
                return self.own.run_steps(spec, [*overrides, "train.shards=8"], steps)
        in_turn = ["8 shards, kernels launched in turn"] if self.options.early else []
        for name in in_turn:
            turns.add(name, run_in_turn)
        ways = []
        for way, answer in (peer.ways.items() if peer else ()):
            if answer["parameters"] != explained["parameters"]:
                self.report.fail(f"peer/{title}/{way}",
                                 f"{answer['parameters']} parameters, and ours has {explained['parameters']}")
                continue
            ways.append(way)
            turns.add(way, lambda steps, way=way: peer.measure(way, steps))
        turns.take(ways)
        ways.sort(key=lambda way: max(turns.rates(way, [None]), default=0), reverse=True)
        guess = max((max(turns.rates(way, [None]), default=0) for way in ways), default=0)
        for name in (*own.values(), *in_turn):
            turns.steps[name] = steps_at(guess)
        if not guess:
            turns.take(own.values())
        for round_number in range(self.options.rounds):
            turns.take([*in_turn, own[8], *ways[:1], own[1], *ways[1:]], round_number)
        self.tell(title, turns, own, ways, flops_of_step(explained), precision)
        for name in in_turn:
            if turns.rate(own[8]) and turns.rate(name):
                self.report.add(f"early/{title}", 100 * (turns.ratio(own[8], name) - 1), "%")
        if idle:
            self.report.add(f"host/{title}", statistics.median(idle), "%")
            self.rows[-1]["idle"] = statistics.median(idle)
        if self.options.trace:
            self.trace(title, spec, [*overrides, "train.shards=8"])

    def tell(self, title, turns, own, ways, flops, precision):
        report = self.report
        ways = [way for way in ways if turns.rate(way)]
        for way in ways:
            report.add(f"peer/train/{title}/{way}", turns.rate(way), "samples/s")
        best = max(ways, key=turns.rate, default=None)
        row = {"title": title, "ways": {way: turns.rate(way) for way in ways}, "best": best}
        for shards, name in own.items():
            rate = turns.rate(name)
            if rate is None:
                continue
            key = f"train/{title}/{shards}"
            report.add(key, rate, "samples/s", f"PyTorch {best}" if best else None, turns.rate(best) if best else None,
                       turns.ratio(name, best) if best else None)
            if precision in self.floor:
                report.add_fraction(key, rate * flops / self.floor[precision] / 1e12)
            memory = turns.memory[name]
            report.add(f"memory/{title}/{shards}", memory / 1e6 if memory else None, "MB",
                       f"PyTorch {best}" if best else None,
                       turns.memory[best] / 1e6 if best else None, less_is_better=True)
            row[shards] = report.rows[key]
            row[f"memory {shards}"] = report.rows[f"memory/{title}/{shards}"]
        if turns.rate(own[8]) and turns.rate(own[1]):
            price = 100 * (1 - turns.ratio(own[8], own[1]))
            report.add(f"exactness/{title}", price, "%")
            row["price"] = price
        self.rows.append(row)

    def trace(self, title, spec, overrides):
        program = os.path.join(self.own.libexec, "gpu_trace.so")
        path = os.path.join(self.own.folder, "trace-" + title.replace("/", "-"))
        # A kernel that began early would be charged with the time in which it waits.
        environment = {"CUDA_INJECTION64_PATH": program, "LOCKSTEP_TRACE": path,
                       "LD_LIBRARY_PATH": self.libraries(), **LATE}
        try:
            with changed_environment(environment):
                self.own.run_steps(spec, overrides, 40 if title.startswith(ALONE) else TRACED_STEPS)
            traces = [found for found in glob.glob(f"{path}.*") if os.path.getsize(found) > 0]
            if not traces:
                raise Failed("no trace was written")
            classes, kernels, count = shares_of(max(traces, key=os.path.getsize))
        except (Failed, OSError, ValueError) as failure:
            print(f"  not traced: {title}: {failure}", file=sys.stderr, flush=True)
            return
        for kind, share in classes.items():
            self.report.add(f"trace/{title}/{kind}", share, "%")
        self.report.rows[f"trace/{title}/gaps"]["kernels"] = kernels
        self.traces.append((title, classes, kernels))

    def markdown(self, machine):
        torch = f"PyTorch {self.torch['torch']}" if self.torch else None
        rows = self.report.rows

        def floor_of(name, unit):
            return f"{number(self.floor[name])} {unit}" if name in self.floor else "not measured"
        libraries = ", ".join(f"{key} {value}" for key, value in machine["libraries"].items() if value)
        lines = [
            f"Measured by `{machine['command']}` on {machine['utc'][:10]} on one {machine['device']} (driver "
            f"{machine['driver']}, {libraries}): a copy moves {floor_of('copy', 'GB/s')}; products of 8192 x 8192 x "
            "8192 reach " + ", ".join(f"{floor_of(p, 'TFLOP/s')} in {p}" for p in ("bf16", "tf32", "fp32"))
            + f". Medians of {machine['rounds']} interleaved rounds of {machine['seconds']:g} s; samples/s of whole "
            "steps, ours with gathering, normalizing and reports and without per-step digests, "
            + (f"{torch}'s (channels_last, fused optimizer, cuDNN's algorithms by timing) with its data on the GPU."
               if torch else "and no PyTorch to compare with."), ""]
        ways = [way for way in ("eager", "graphed", "compiled") if any(way in row["ways"] for row in self.rows)]

        def shown(row, key, field, form):
            value = row[key][field] if key in row else None
            return "" if value is None else form(value)
        body = []
        for row in self.rows:
            model, batch, precision = row["title"].split("/")
            memory = shown(row, "memory 8", "value", number), shown(row, "memory 8", "peer_value", number)
            body.append([model, batch, precision, shown(row, 8, "value", number), shown(row, 1, "value", number),
                         *[number(row["ways"].get(way)) for way in ways],
                         shown(row, 8, "ratio", lambda x: f"**{x:.2f}**"), shown(row, 1, "ratio", lambda x: f"{x:.2f}"),
                         shown(row, 8, "fraction_of_floor", lambda x: f"{100 * x:.1f}%"),
                         f"{row['price']:.1f}%" if "price" in row else "",
                         f"{row['idle']:.0f}%" if "idle" in row else "", " / ".join(memory)])
        lines += table(["model", "batch", "precision", "8 shards", "1 shard", *[f"PyTorch {way}" for way in ways],
                        "8 shards / PyTorch's best", "1 shard / PyTorch's best", "of the matrix peak",
                        "price of exactness", "host idle", "GPU memory MB, ours / its"], body)
        lines += ["", "Memory is ours of the whole process, its CUDA context included, and PyTorch's of its tensors "
                  "alone.", ""]
        if self.kernels:
            lines += table(["kernel", "shape", "GB/s", "of a copy"],
                           [[one["name"], one["shape"], number(one["gb_per_second"]), f"{100 * one['of_copy']:.0f}%"]
                            for one in self.kernels])
            launches = ", ".join(f"{rows[f'gpu/launch/{how}']['value']:g} us from a {how}"
                                 for how in ("stream", "graph") if f"gpu/launch/{how}" in rows)
            lines += ["", f"An empty kernel takes {launches}."]
        for title, classes, kernels in self.traces:
            lines += ["", f"{title}, 8 shards, share of a step's time: " + ", ".join(
                f"{kind} {share:.1f}%" for kind, share in classes.items() if share >= 0.1)
                + "; kernels: "
                + ", ".join(f"{name} {share:.1f}%" for name, share in kernels.items() if share >= 1) + "."]
        if not self.traces:
            lines += ["", "Time by class of kernels, and the gaps between kernels: not measured."]
        return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--out", default=os.path.join(HERE, "results"), help="folder of gpu-<UTC time>.jsonl")
    parser.add_argument("--models", type=names, default=list(MODELS))
    parser.add_argument("--precisions", type=names, default=[], help="of those that a model is measured in")
    parser.add_argument("--ways", type=names, default=["eager", "graphed", "compiled"], help="PyTorch's; empty: none")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--together", action="store_true", help="prepare all of PyTorch's ways at once")
    parser.add_argument("--early", action="store_true", help="also what kernels that begin early gain")
    parser.add_argument("--trace", action="store_true", help="also which kernels a step's time goes to")
    parser.add_argument("--limit", type=float, default=1500, help="seconds after which nothing new is measured")
    options = parser.parse_args()
    for model in options.models:
        if model not in MODELS:
            parser.error(f"no model {model}; there are {', '.join(MODELS)}")
    os.makedirs(options.out, exist_ok=True)
    utc = datetime.now(timezone.utc)
    report = Report(os.path.join(options.out, f"gpu-{utc.strftime('%Y%m%dT%H%M%SZ')}.jsonl"))
    memory = Memory()
    with tempfile.TemporaryDirectory() as folder:
        own = Own(folder, memory)
        doctor = own.doctor()
        usable = [gpu for gpu in doctor["gpus"] if not gpu.get("cannot_use")]
        build = os.path.join(ROOT, "BUILD")
        revision = (dict(line.split(maxsplit=1) for line in open(build)).get("revision", "").strip()
                    if os.path.exists(build)
                    else output_of(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], 30).strip())
        machine = {"device": usable[0]["name"] if usable else None, "driver": doctor.get("kernel_driver") or
                   doctor.get("driver"), "libraries": {key: doctor.get(key) for key in ("cublaslt", "cudnn", "nccl")},
                   "utc": utc.strftime("%Y-%m-%dT%H:%M:%SZ"), "revision": revision, "rounds": options.rounds,
                   "seconds": options.seconds, "command": " ".join(["tests/bench/run.sh gpu", *sys.argv[1:]])}
        report.write(machine)
        try:
            if not usable:
                report.fail("gpu", doctor["problems"][0]["problem"] if doctor.get("problems") else "no GPU can be used")
            else:
                benchmark = Benchmark(options, report, own)
                benchmark.measure_floor()
                benchmark.measure()
                machine["torch"] = benchmark.torch
                text = benchmark.markdown(machine)
                machine["markdown"] = text
                print(text)
        finally:
            memory.close()
            report.close()
    for failure in report.failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
