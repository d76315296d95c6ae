"""Runs the programs of build/bin for the benchmark: one job on a cluster of this machine at a time."""
import csv
import json
import os
import subprocess
import time


class Failed(Exception):
    """A configuration that gave no figure; the text says why, in one line."""


def last_line(text):
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"


def peak_bytes(pid):
    """The most memory that a process has held at a time; 0 where it is gone."""
    try:
        with open(f"/proc/{pid}/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return 1024 * int(line.split()[1])
    except OSError:
        pass
    return 0


def workers_of(pid):
    """The worker processes that a `lockstep run` has started."""
    workers = []
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as children:
            for child in children.read().split():
                with open(f"/proc/{child}/comm") as name:
                    if name.read().startswith("lockstep-worker"):
                        workers.append(int(child))
    except OSError:
        pass
    return workers


class Programs:
    """bin_folder: of lockstep, lockstep-server and lockstep-worker; folder: for what runs leave behind."""

    def __init__(self, bin_folder, folder):
        self.bin_folder, self.folder, self.runs = bin_folder, folder, 0

    def _path(self, name):
        return os.path.join(self.bin_folder, name)

    def _folder(self):
        self.runs += 1
        return os.path.join(self.folder, f"run-{self.runs}")

    def version(self):
        return subprocess.run([self._path("lockstep"), "--version"], capture_output=True, text=True).stdout.strip()

    def explain(self, spec, overrides=()):
        command = [self._path("lockstep"), "explain", spec, "-o", "json"]
        for override in overrides:
            command += ["--set", override]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise Failed(last_line(done.stderr))
        return json.loads(done.stdout)

    def train(self, spec, overrides, workers, slots, steps, warmup):
        """Steady samples/s, peak bytes of all workers together, seconds until the first step's record.

        The rate is that of the wall clock from the end of step `warmup` to the end of the last one, as the
        run's metrics.csv has them: waiting for data, digests and reports are within it, the start is not.
        """
        out = self._folder()
        command = [self._path("lockstep"), "run", spec, "--workers", str(workers), "--slots", str(slots),
                   "--out", out, "-o", "json", "--set", f"train.steps={steps}"]
        for override in overrides:
            command += ["--set", override]
        start, first_step, peaks = time.time(), None, {}
        digests = os.path.join(out, "digests.jsonl")
        with open(os.path.join(self.folder, "stderr"), "w+") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            try:
                while process.poll() is None:
                    if first_step is None and os.path.exists(digests) and os.path.getsize(digests) > 0:
                        first_step = time.time() - start
                    if first_step is not None:
                        for worker in workers_of(process.pid):
                            peaks[worker] = max(peaks.get(worker, 0), peak_bytes(worker))
                    time.sleep(0.002 if first_step is None else 0.05)
                output = process.stdout.read()
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
            errors.seek(0)
            if process.returncode != 0:
                raise Failed(last_line(errors.read()))
        result = json.loads(output.strip().splitlines()[-1])
        with open(os.path.join(out, "metrics.csv")) as table:
            rows = [row for row in csv.DictReader(table) if row["samples"]]
        if len(rows) != steps:
            raise Failed(f"metrics.csv has {len(rows)} steps of {steps}")
        samples = sum(int(row["samples"]) for row in rows[warmup:])
        seconds = float(rows[-1]["seconds"]) - float(rows[warmup - 1]["seconds"])
        return {"samples_per_second": samples / seconds, "peak_bytes": sum(peaks.values()),
                "first_step_seconds": first_step, "state_digest": result["state_digest"]}

    def submit_to_first_step(self, spec, overrides):
        """Seconds from the start of `lockstep submit` to the first step's record, on a cluster that is up."""
        folder = self._folder()
        os.makedirs(folder)
        ready, ready_end = os.pipe()
        processes = []
        try:
            processes.append(subprocess.Popen(
                [self._path("lockstep-server"), "--listen", "127.0.0.1:0", "--data-dir", f"{folder}/server",
                 "--ready-fd", str(ready_end)], pass_fds=[ready_end], stderr=subprocess.DEVNULL))
            os.close(ready_end)
            ready_end = -1
            with os.fdopen(ready) as line:
                coordinator = line.readline().strip()
            if not coordinator:
                raise Failed("lockstep-server did not start")
            at = ["--coordinator", coordinator]
            processes.append(subprocess.Popen(
                [self._path("lockstep-worker"), *at, "--slots", "cpu:2", "--name", "bench", "--work-dir", folder],
                stderr=subprocess.DEVNULL))
            deadline = time.time() + 20
            while "bench" not in subprocess.run([self._path("lockstep"), "workers", *at], capture_output=True,
                                                text=True).stdout:
                if time.time() > deadline:
                    raise Failed("lockstep-worker did not register")
                time.sleep(0.05)
            out = os.path.join(folder, "job")
            command = [self._path("lockstep"), "submit", spec, *at, "--out", out, "--set", "train.steps=20"]
            for override in overrides:
                command += ["--set", override]
            start = time.time()
            submit = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            processes.append(submit)
            digests = os.path.join(out, "digests.jsonl")
            while not (os.path.exists(digests) and os.path.getsize(digests) > 0):
                if submit.poll() not in (None, 0):
                    raise Failed(last_line(submit.stderr.read()))
                if time.time() > start + 60:
                    raise Failed("no first step within a minute")
                time.sleep(0.002)
            return time.time() - start
        finally:
            if ready_end >= 0:
                os.close(ready_end)
            for process in reversed(processes):
                process.terminate()
            for process in processes:
                process.wait()
