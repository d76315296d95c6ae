"""The checks that need a GPU. See run.sh for its use; runs from an unpacked bundle (deploy/bundle.sh).

Stages, in this order, each with a deadline of its own:
  kernels     every kernel against its definition in double, leaves together against leaves apart, and the vendor's
              libraries behind their wrappers
  gradients   whole models: the first gradients of all models that tests/numerics has goldens for, which the CPU's have
              been compared with, beside the CPU's; then losses, placements and resuming, all in one process
  digests     `lockstep run`: 1 slot, the same with kernels that begin in turn, 2 slots, and 2 processes over the host's
              memory end with the same state digest
  nccl        2 and 3 processes that share the GPU exchange over NCCL: the same digests; and one of 3 is killed
  sanitizer   compute-sanitizer's memcheck and racecheck on some of the kernel tests
  benchmarks  tests/bench/run.sh gpu, in little

Writes to --out (default gpu-checks): results.jsonl, first the machine, versions and command, then a line a check;
checks.log, what the programs printed; bench.jsonl. Exits with 1 where a check failed.
"""
import argparse
import array
import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
# How `lockstep run` is told that processes exchange gradients over NCCL, also where they share a GPU.
OVER_NCCL = {"LOCKSTEP_COLLECTIVE": "nccl"}
# And that none of its kernels begins before the one before has ended.
IN_TURN = {"LOCKSTEP_CUDA_EARLY_LAUNCH": "0"}
# NCCL says in such a file that it was there.
NCCL_LOG = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,ENV"}
# Seconds; together within 8 minutes.
STAGES = {"kernels": 85, "gradients": 50, "digests": 60, "nccl": 150, "sanitizer": 60, "benchmarks": 75}
FASHION = "/usr/share/datasets/fashion-mnist"
RUN_SECONDS = 40  # of one `lockstep run`
AFTER_KILL_SECONDS = 30
LONG_NCCL_SECONDS = 45  # a dozen teams of processes
# Of a tensor's largest element: twice what the CPU's gradients may be off from the goldens (tests/numerics).
GRADIENT_TOLERANCE = 2e-5
SHARDS_OF_TESTS = 4  # processes that share a test program's tests
# Of the kernel tests, those that a sanitizer ends in time: each kind of kernel, but not the large products.
SANITIZED = {
    "memcheck": ("AlignmentTest.*:CopyTest.*:GatherTest.*:PoolTest.*:NormTest.MomentsMatch*:NormTest.Backward*:"
                 "LossTest.*:MapsTest.Softmax*:MapsTest.Embedding*:LstmTest.MatchesTheDefinition*:"
                 "StoredBf16Test.RowsOf*:StoredBf16Test.NormsGive*"),
    "racecheck": ("NormTest.MomentsMatch*:NormTest.BackwardMatchesTheReference*:LossTest.Softmax*:MapsTest.Softmax*:"
                  "MapsTest.Embedding*:PoolTest.MaxMatches*:LstmTest.MatchesFiniteDifferences*"),
}
LEAVES_SANITIZED = {"memcheck": "-*Convolution*:*ManyRows*:*RowsDoNot*",
                    "racecheck": "-*Convolution*:*ManyRows*:*RowsDoNot*:*PartsAreSummed*"}
SYNTHETIC = "data={format: synthetic, shape: [28, 28, 1], train_samples: 1000, validation_samples: 1003}"
SHORT = ["train.batch=127", "data.train_samples=1000", "data.validation_samples=1003", "train.evaluate.batch=333",
         "train.evaluate.every_steps=7", "train.digest_every=1"]
# name: spec, whether it reads images of 28 x 28, what is set
MODELS = {
    "mlp": ("deploy/jobs/mlp.yaml", True, ["train.steps=30", *SHORT]),
    "fashion-cnn": ("deploy/jobs/fashion-cnn.yaml", True, ["train.steps=30", *SHORT]),
    "fashion-cnn-bf16": ("deploy/jobs/fashion-cnn.yaml", True, ["train.steps=30", "train.precision=bf16", *SHORT]),
    "lstm": ("tests/bench/specs/lstm.yaml", True, ["train.steps=20", *SHORT]),
    "lstm-bf16": ("tests/bench/specs/lstm.yaml", True, ["train.steps=20", "train.precision=bf16", *SHORT]),
    "resnet20": ("tests/bench/specs/resnet20.yaml", False, ["train.steps=12", *SHORT]),
    "resnet20-bf16": ("tests/bench/specs/resnet20.yaml", False, ["train.steps=12", "train.precision=bf16", *SHORT]),
}
KILLED_STEPS = 5000  # of a run one of whose workers is killed: long enough to be met in the middle


class Wrong(Exception):
    """Why a check failed, in a line; and all that a program said."""

    def __init__(self, why, output=""):
        super().__init__(why)
        self.output = output


class Skipped(Exception):
    """Why a check cannot be made here."""


def last_lines(text, count=1):
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-count:])[:400] or "no output"


class Checks:
    def __init__(self, out):
        self.out, self.scratch = out, tempfile.mkdtemp(prefix="lockstep-gpu-")
        self.results = open(os.path.join(out, "results.jsonl"), "w")
        self.log = open(os.path.join(out, "checks.log"), "w")
        self.failed, self.deadline, self.digests, self.made = 0, 0.0, {}, 0
        self.environment = dict(os.environ)
        mnist = os.path.join(ROOT, "data", "mnist")
        if "LOCKSTEP_DATA" not in os.environ and os.path.isdir(mnist):
            self.environment["LOCKSTEP_DATA"] = os.path.dirname(mnist)
        self.mnist = os.path.isdir(os.path.join(self.environment.get("LOCKSTEP_DATA", "/nowhere"), "mnist"))

    def program(self, name):
        for folder in ("bin", "libexec"):
            path = os.path.join(ROOT, folder, name)
            if os.path.exists(path):
                return path
        raise Skipped(f"the bundle has no {name}")

    def write(self, row):
        self.results.write(json.dumps(row) + "\n")
        self.results.flush()

    def execute(self, command, seconds=None, environment=None, title=None):
        """Exit code, standard output and standard error; its whole process group is gone afterwards."""
        seconds = min(seconds or 1e9, self.deadline - time.time())
        title = title or os.path.basename(command[0])
        if seconds < 1:
            raise Wrong("no time was left in its stage")
        with tempfile.TemporaryFile("w+", errors="replace") as output, \
                tempfile.TemporaryFile("w+", errors="replace") as errors:
            process = subprocess.Popen(command, stdout=output, stderr=errors, stdin=subprocess.DEVNULL,
                                       env={**self.environment, **(environment or {})}, start_new_session=True)
            late = False
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                late = True
                process.terminate()  # `lockstep run` ends its cluster then
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    pass
            finally:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                process.wait()
            output.seek(0), errors.seek(0)
            said, complained = output.read(), errors.read()
        self.log.write(f"==== {title}: {' '.join(command)}\n{said[-200000:]}\n{complained[-20000:]}\n")
        self.log.flush()
        if late:
            raise Wrong(f"did not end within {seconds:.0f} s: {last_lines(said + complained)}")
        return process.returncode, said, complained

    def check(self, stage, name, work):
        """work() returns details for the results (`what` for the printed line), or raises Wrong or Skipped."""
        began, details = time.time(), {}
        try:
            details = work() or {}
            status = "ok"
        except Wrong as wrong:
            status, details["why"] = "FAILED", str(wrong)
        except Skipped as why:
            status, details["why"] = "skipped", str(why)
        except Exception as error:  # of ours: the other checks go on
            status, details["why"] = "FAILED", f"{type(error).__name__}: {error}"
        seconds = time.time() - began
        self.failed += status == "FAILED"
        shown = f"skipped ({details['why']})" if status == "skipped" else status
        after = details["why"] if status == "FAILED" else details.get("what", "")
        print(f"{shown}  {stage}/{name}  {seconds:.1f}" + (f"  {after}" if after else ""), flush=True)
        self.write({"stage": stage, "name": name, "status": status, "seconds": round(seconds, 2), **details})

    def together(self, stage, works, at_once):
        """Checks (name, work) at once."""
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(lambda one: self.check(stage, *one), works))

    # ---- parts of checks.

    def libraries(self):
        """Of a program that is linked with NVIDIA's libraries: their folders, as `lockstep doctor` finds them."""
        _, said, _ = self.execute([self.program("lockstep"), "doctor", "-o", "json"], 60)
        cuda = json.loads(said)["cuda"]
        folders = [os.path.dirname(one["path"]) for one in cuda["libraries"] if one["path"].startswith("/")]
        return {"LD_LIBRARY_PATH": ":".join(dict.fromkeys(folders + cuda["folders"]))}

    def tests(self, program, filters="*", shard=None, before=(), seconds=None):
        """A program of GoogleTest, or a part of one."""
        self.made += 1
        report = os.path.join(self.scratch, f"tests-{self.made}-{shard}.json")
        command = [*before, self.program(program), f"--gtest_filter={filters}", f"--gtest_output=json:{report}"]
        environment = {} if shard is None else {"GTEST_TOTAL_SHARDS": str(SHARDS_OF_TESTS),
                                                "GTEST_SHARD_INDEX": str(shard)}
        code, said, complained = self.execute(command, seconds, environment)
        try:
            with open(report) as file:
                read = json.load(file)
        except (OSError, ValueError):
            raise Wrong(f"ended with {code}: {last_lines(said + complained, 2)}", said + complained) from None
        names = [f"{suite['name']}.{test['name']}" for suite in read["testsuites"] for test in suite["testsuite"]
                 if test.get("failures")]
        if names:
            raise Wrong(f"{len(names)} of {read['tests']}: {', '.join(names)}"[:1000])
        if code != 0:
            raise Wrong(f"ended with {code}: {last_lines(said + complained, 2)}")
        if read["tests"] == 0 and shard is None:
            raise Wrong("no test was run")
        return {"what": f"{read['tests']} tests", "tests": read["tests"]}

    def train(self, name, workers, slots, environment=None, extra=(), seconds=RUN_SECONDS):
        """The result of `lockstep run` and its folder."""
        spec, images, sets = MODELS[name]
        self.made += 1
        out = os.path.join(self.scratch, f"{name}-{workers}x{slots}-{self.made}")
        command = [self.program("lockstep"), "run", os.path.join(ROOT, spec), "--device", "cuda", "--workers",
                   str(workers), "--slots", str(slots), "--out", out, "-o", "json"]
        if images:
            command += ["--set", "data.path=mnist" if self.mnist else SYNTHETIC]
        for one in [*sets, *extra]:
            command += ["--set", one]
        code, said, complained = self.execute(command, seconds, environment, f"{name} {workers}x{slots}")
        try:
            result = json.loads(said.strip().splitlines()[-1])
        except (IndexError, ValueError):
            raise Wrong(f"lockstep run ended with {code}: {last_lines(complained)}") from None
        for path in glob.glob(os.path.join(out, "logs", "*")):
            with open(path, errors="replace") as file:
                self.log.write(f"---- {path}\n{file.read()[-4000:]}\n")
        if result["state"] != "SUCCEEDED":
            raise Wrong(f"{result['state']}: {result.get('reason')}")
        shutil.rmtree(os.path.join(out, "checkpoints"), ignore_errors=True)
        return result

    def digest(self, name):
        """Of one slot, which all others must have."""
        if name not in self.digests:
            self.digests[name] = self.train(name, 1, 1)["state_digest"]
        return self.digests[name]

    def same_digest(self, name, workers, slots, environment=None):
        result = self.train(name, workers, slots, environment)
        expected = self.digest(name)
        if result["state_digest"] != expected:
            raise Wrong(f"{result['state_digest']}, and one slot has {expected}; runs differ in a bit")
        return {"what": expected, "state_digest": expected, "samples_per_second": result["samples_per_second"],
                "loss": result["train"]["loss"]}

    # ---- the stages.

    def kernels(self):
        works = [(f"cuda_device_test-{i + 1}", lambda i=i: self.tests("cuda_device_test", shard=i))
                 for i in range(SHARDS_OF_TESTS)]
        works.append(("gpu_kernels_test", lambda: self.tests("gpu_kernels_test")))
        found = self.libraries()

        def library(*arguments):
            code, said, complained = self.execute([self.program("library_check"), *arguments], None, found)
            lines = [line for line in said.splitlines() if line.startswith(("product", "convolution"))]
            bad = [line for line in said.splitlines() if "FAILED" in line or "WRONG" in line]
            if bad or code != 0:
                raise Wrong(f"{len(bad)} of {len(lines)}: {last_lines(bad[0] if bad else said + complained)}")
            if not lines:
                raise Wrong("nothing was checked")
            return {"what": f"{len(lines)} calls", "calls": len(lines)}
        works.append(("library_check product", lambda: library("product")))
        for part in ("lenet", "mnist", "resnet20", "resnet50", "odd", "dilated", "grouped"):
            works.append((f"library_check convolution {part}", lambda part=part: library("convolution", f" {part} ")))
        self.together("kernels", works, 8)

    def gradients(self):
        # Of Fashion-MNIST, or MNIST.
        if not os.path.isdir(FASHION):
            if not self.mnist:
                def no_data():
                    raise Skipped(f"neither {FASHION} nor MNIST: deploy/bundle.sh --with-data")
                return self.check("gradients", "cuda_train_test", no_data)
            self.environment["LOCKSTEP_TEST_IMAGES"] = os.path.join(self.environment["LOCKSTEP_DATA"], "mnist")
        works = [(os.path.basename(path).removesuffix(".json"), lambda path=path: self.same_gradients(path))
                 for path in sorted(glob.glob(os.path.join(ROOT, "tests", "numerics", "goldens", "*.json")))]
        works += [(f"cuda_train_test-{i + 1}", lambda i=i: self.tests("cuda_train_test", shard=i))
                  for i in range(SHARDS_OF_TESTS)]
        self.together("gradients", works, 8)

    def same_gradients(self, path):
        """After one step of sgd with a huge rate the parameters are the gradients, but for what was there before,
        which is the same on both devices."""
        with open(path) as file:
            text = json.load(file)["spec"]
        text.pop("schedule", None)
        text["optimizer"] = {"type": "sgd", "learning_rate": 1e6}
        images = os.environ.get("LOCKSTEP_TEST_IMAGES", self.environment.get("LOCKSTEP_TEST_IMAGES", FASHION))
        text["data"].update(path=images, train_samples=1000, validation_samples=100)
        text["train"].update(steps=1, shards=4)
        self.made += 1
        folder = os.path.join(self.scratch, f"gradients-{self.made}")
        os.makedirs(folder)
        spec = os.path.join(folder, "spec.yaml")
        with open(spec, "w") as file:
            json.dump(text, file)
        states = {}
        for device in ("cuda", "cpu"):
            out = os.path.join(folder, device)
            code, said, complained = self.execute([self.program("lockstep"), "run", spec, "--device", device, "--slots",
                                                   "1", "--out", out, "-o", "json"], RUN_SECONDS, None, path)
            try:
                result = json.loads(said.strip().splitlines()[-1])
                states[device] = tensors_of(os.path.join(result["checkpoint"], "model.safetensors"))
            except (IndexError, ValueError, KeyError, OSError):
                raise Wrong(f"lockstep run --device {device} ended with {code}: {last_lines(complained)}") from None
        worst, where = 0.0, ""
        for name, expected in states["cpu"].items():
            if "running_" in name:
                continue
            largest = max(map(abs, expected))
            error = max(abs(a - b) for a, b in zip(states["cuda"][name], expected))
            if not error <= worst * largest:
                worst, where = (error / largest if largest > 0 else float("inf")), name
        if not worst <= GRADIENT_TOLERANCE:
            raise Wrong(f"{where} differs by {worst:.1e} of its largest element")
        return {"what": f"{worst:.1e} of the largest element, in {where}", "error": worst}

    def digest_checks(self):
        def placements(name):
            self.check("digests", f"{name} 1x1", lambda: {"what": self.digest(name), "state_digest": self.digest(name)})
            if name in self.digests:
                self.check("digests", f"{name} 1x1, kernels in turn", lambda: self.same_digest(name, 1, 1, IN_TURN))
                for workers, slots in ((1, 2), (2, 1)):
                    self.check("digests", f"{name} {workers}x{slots}",
                               lambda: self.same_digest(name, workers, slots))
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(placements, MODELS))

    def nccl(self):
        def over_nccl(name, workers):
            log = os.path.join(self.scratch, f"nccl-{name}-{workers}")
            details = self.same_digest(name, workers, 1, {**OVER_NCCL, **NCCL_LOG, "NCCL_DEBUG_FILE": f"{log}.%p"})
            said = [text for path in glob.glob(f"{log}.*") for text in [open(path, errors="replace").read()]]
            for text in said:
                self.log.write(f"---- NCCL\n{text[:3000]}\n")
            if sum("NCCL" in text for text in said) < workers:
                raise Wrong(f"the digests are equal, but {len(said)} of {workers} processes say that they use NCCL")
            return details
        for name in MODELS:
            for workers in (2, 3):
                self.check("nccl", f"{name} {workers}x1", lambda: over_nccl(name, workers))
        self.check("nccl", "one of 3 is killed", lambda: self.kill_one(OVER_NCCL))
        long = "Nccl.ProcessesGiveTheSerialTreesBits"
        self.check("nccl", "cuda_nccl_test", lambda: self.tests("cuda_nccl_test", f"-{long}"))

        def if_there_is_time():
            if self.deadline - time.time() < LONG_NCCL_SECONDS:
                raise Skipped("the stage has no time left for it")
            return self.tests("cuda_nccl_test", long)
        self.check("nccl", "cuda_nccl_test of many sizes", if_there_is_time)

    def kill_one(self, environment):
        """SIGKILL to a rank in mid-run: the run ends with the bits of an undisturbed one, or says within its
        deadline who is missing."""
        long = [f"train.steps={KILLED_STEPS}", "train.epochs=100000", "train.evaluate.every_steps=0",
                "train.evaluate.every_epochs=0", "checkpoint.every_epochs=0"]
        expected = self.train("mlp", 1, 1, extra=long)["state_digest"]
        out = os.path.join(self.scratch, "killed")
        command = [self.program("lockstep"), "run", os.path.join(ROOT, MODELS["mlp"][0]), "--device", "cuda",
                   "--workers", "3", "--slots", "1", "--out", out, "-o", "json",
                   "--set", "data.path=mnist" if self.mnist else SYNTHETIC]
        for one in [*MODELS["mlp"][2], *long]:
            command += ["--set", one]
        killed = {}

        def wait_and_kill():
            while time.time() < self.deadline and "stop" not in killed:
                workers = processes_with(out_marker(out))
                try:
                    with open(os.path.join(out, "digests.jsonl")) as ledger:
                        steps = sum(1 for _ in ledger)
                except OSError:
                    steps = 0
                if steps >= 20 and len(workers) == 3:
                    os.kill(workers[1], signal.SIGKILL)
                    killed.update(at=time.time(), steps=steps, workers=workers)
                    return
                time.sleep(0.01)

        def out_marker(folder):
            return ("lockstep-worker", folder)

        with ThreadPoolExecutor(1) as pool:
            killing = pool.submit(wait_and_kill)
            try:
                code, said, complained = self.execute(command, None, environment, "one of 3 is killed")
            finally:
                killed["stop"] = True
                killing.result()
        if "at" not in killed:
            raise Wrong(f"it ended before a worker was killed: {last_lines(complained)}")
        seconds = time.time() - killed["at"]
        try:
            result = json.loads(said.strip().splitlines()[-1])
        except (IndexError, ValueError):
            raise Wrong(f"ended with {code} and no result: {last_lines(complained)}") from None
        left = processes_with(("lockstep-", out))
        if left:
            raise Wrong(f"processes are left: {left}")
        if result["state"] == "SUCCEEDED":
            if result["state_digest"] != expected:
                raise Wrong(f"{result['state_digest']}, and undisturbed {expected}")
            return {"what": f"killed at step {killed['steps']}, ended with the undisturbed digest"}
        if seconds > AFTER_KILL_SECONDS:
            raise Wrong(f"took {seconds:.0f} s to say: {result.get('reason')}")
        if not result.get("reason"):
            raise Wrong(f"{result['state']} without a reason")
        return {"what": f"killed at step {killed['steps']}, reported {seconds:.1f} s later: {result['reason']}"}

    def sanitizer(self):
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
        tool = shutil.which("compute-sanitizer") or next(
            (path for path in (f"{home}/bin/compute-sanitizer", f"{home}/compute-sanitizer/compute-sanitizer",
                               "/usr/local/cuda/bin/compute-sanitizer", "/opt/cuda/bin/compute-sanitizer")
             if os.access(path, os.X_OK)), None)

        def under(kind, program, filters, shard):
            if tool is None:
                raise Skipped("no compute-sanitizer in PATH or the toolkit's folder")
            # What the CUDA runtime and its libraries themselves try and fail, is no error of ours.
            before = [tool, "--tool", kind, "--error-exitcode", "9", "--print-limit", "10",
                      *(["--report-api-errors", "no"] if kind == "memcheck" else [])]
            try:
                return self.tests(program, filters, shard, before)
            except Wrong as wrong:
                if "device not supported" in wrong.output.lower():
                    raise Skipped("compute-sanitizer: Device not supported") from None
                raise
        works = [(f"{kind} cuda_device_test-{i + 1}",
                  lambda kind=kind, filters=filters, i=i: under(kind, "cuda_device_test", filters, i))
                 for kind, filters in SANITIZED.items() for i in range(SHARDS_OF_TESTS)]
        works += [(f"{kind} gpu_kernels_test", lambda kind=kind: under(
            kind, "gpu_kernels_test", LEAVES_SANITIZED[kind], None)) for kind in SANITIZED]
        self.together("sanitizer", works if tool else works[:1], len(works))

    def benchmarks(self):
        def bench():
            path = os.path.join(self.out, "bench.jsonl")
            code, said, complained = self.execute(
                ["bash", os.path.join(ROOT, "tests", "bench", "run.sh"), "gpu", "--out", self.scratch, "--seconds",
                 "0.3", "--rounds", "1", "--models", "mlp,lstm,resnet20", "--ways", "graphed", "--limit",
                 str(max(10, int(self.deadline - time.time() - 15)))])
            for found in glob.glob(os.path.join(self.scratch, "gpu-*.jsonl")):
                shutil.copy(found, path)
            print(said, flush=True)
            if code != 0:
                raise Wrong(last_lines(complained))
        self.check("benchmarks", "tests/bench/run.sh gpu", bench)


def tensors_of(path):
    """Of a safetensors file of float32, lists of the values by name."""
    with open(path, "rb") as file:
        data = file.read()
    size = int.from_bytes(data[:8], "little")
    tensors = {}
    for name, about in json.loads(data[8:8 + size]).items():
        if name != "__metadata__":
            begin, end = about["data_offsets"]
            tensors[name] = array.array("f", data[8 + size + begin:8 + size + end]).tolist()
    return tensors


def processes_with(texts):
    """Pids of the processes whose command lines have all of the texts, or of the children of one that has the last."""
    found, lines, parents = [], {}, {}
    for pid in os.listdir("/proc"):
        if not pid.isdigit():
            continue
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                lines[int(pid)] = file.read().replace(b"\0", b" ").decode(errors="replace")
            with open(f"/proc/{pid}/stat", errors="replace") as file:
                parents[int(pid)] = int(file.read().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError, ValueError):
            continue
    for pid, line in lines.items():
        if all(text in line or text in lines.get(parents.get(pid), "") for text in texts[1:]) and \
                line.split(" ")[0].rsplit("/", 1)[-1].startswith(texts[0]):
            found.append(pid)
    return sorted(found)


def first_line(checks):
    """The machine, versions and command."""
    command = [checks.program("lockstep"), "doctor", "--device", "cuda", "-o", "json"]
    code, said, complained = checks.execute(command, 60)
    try:
        doctor = json.loads(said.strip().splitlines()[-1])["cuda"]
    except (IndexError, ValueError, KeyError):
        doctor = {}
    with open(os.path.join(ROOT, "BUILD")) as file:
        build = dict(line.split(maxsplit=1) for line in file.read().splitlines())
    usable = [gpu for gpu in doctor.get("gpus", []) if not gpu.get("cannot_use")]
    line = {"device": usable[0]["name"] if usable else None, "driver": doctor.get("driver"),
            "kernel_driver": doctor.get("kernel_driver"),
            "libraries": {key: doctor.get(key) for key in ("runtime", "cublaslt", "cudnn", "nccl")},
            "utc": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"), "revision": build.get("revision"),
            "version": build.get("version"), "built": build.get("built"), "mnist": checks.mnist,
            "command": " ".join(["tests/gpu/run.sh", *sys.argv[1:]])}
    return line, "" if code == 0 and usable else last_lines(complained or said)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = lambda text: [one for one in text.split(",") if one]  # noqa: E731
    parser.add_argument("--out", default="gpu-checks", help="folder of the results")
    parser.add_argument("--only", type=stages, default=list(STAGES))
    parser.add_argument("--skip", type=stages, default=[])
    options = parser.parse_args()
    for stage in options.only + options.skip:
        if stage not in STAGES:
            parser.error(f"no stage {stage}; there are {', '.join(STAGES)}")
    os.makedirs(options.out, exist_ok=True)
    began = time.time()
    checks = Checks(options.out)
    checks.deadline = began + 60
    try:
        machine, why = first_line(checks)
        checks.write(machine)
        if not why:
            print(f"{machine['device']}, driver {machine['driver']}, {machine['libraries']}, revision "
                  f"{machine['revision']}", flush=True)
        else:
            checks.check("machine", "lockstep doctor --device cuda", lambda: (_ for _ in ()).throw(Wrong(why)))
            return 1
        work = {"digests": checks.digest_checks}
        for stage, seconds in STAGES.items():
            if stage in options.only and stage not in options.skip:
                checks.deadline = time.time() + seconds
                work.get(stage, getattr(checks, stage, None))()
    finally:
        shutil.rmtree(checks.scratch, ignore_errors=True)
    print(f"{checks.failed} failed, {time.time() - began:.0f} s")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
