"""Runs the programs of build/bin for the benchmark: one job on a cluster of this machine at a time."""
import csv
import json
import os
import select
import subprocess
import time

from processes import Failed, children_of, last_line, output_of, peak_bytes, stop

START_TIMEOUT = 120  # seconds of all that is not a step
SLOWEST_STEP = 3  # seconds
COMMAND_TIMEOUT = 60  # seconds of a command that runs nothing
MEMORY_INTERVAL = 0.05  # seconds; the kernel keeps the peak, so only what follows the last look is missed
STEP_INTERVAL = 0.002  # seconds

# The first step has ended, and nothing else has happened, when its checkpoint begins to be written:
# digests.jsonl and events come some tenths of a second later.
FIRST_STEP = ["checkpoint.every_steps=1", "train.steps=2"]


def first_step_ended(out):
    try:
        return len(os.listdir(os.path.join(out, "checkpoints"))) > 0
    except OSError:
        return False


def sets(overrides):
    return [word for override in overrides for word in ("--set", override)]


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
        return output_of([self._path("lockstep"), "--version"], COMMAND_TIMEOUT).strip()

    def explain(self, spec, overrides=()):
        command = [self._path("lockstep"), "explain", spec, "-o", "json", *sets(overrides)]
        return json.loads(output_of(command, COMMAND_TIMEOUT))

    def _run(self, spec, overrides, workers, slots, out, timeout, interval, look):
        """`lockstep run` to its end; look(pid) is called from its start on, every `interval` seconds."""
        command = [self._path("lockstep"), "run", spec, "--workers", str(workers), "--slots", str(slots),
                   "--out", out, *sets(overrides)]
        with open(os.path.join(self.folder, "stderr"), "w+") as errors:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
            deadline = time.time() + timeout
            try:
                while process.poll() is None:
                    if time.time() > deadline:
                        raise Failed(f"lockstep run did not end within {timeout} s")
                    look(process.pid)
                    time.sleep(interval)
            finally:
                stop(process)
            errors.seek(0)
            if process.returncode != 0:
                raise Failed(last_line(errors.read()))

    def train(self, spec, overrides, workers, slots, steps, warmup):
        """Steady samples/s, and the peak bytes of all processes of the run: client, coordinator and workers.

        The rate is that of the wall clock from the end of step `warmup` to the end of the last one, as the
        run's metrics.csv has them: waiting for data, reports and, where the spec wants them, digests are
        within it; the start, the one evaluation and the one checkpoint at the end are not.
        """
        out, peaks = self._folder(), {}

        def look(pid):
            for one in (pid, *children_of(pid)):
                peaks[one] = max(peaks.get(one, 0), peak_bytes(one))

        self._run(spec, [f"train.steps={steps}", *overrides], workers, slots, out,
                  START_TIMEOUT + SLOWEST_STEP * steps, MEMORY_INTERVAL, look)
        seen = sum(1 for peak in peaks.values() if peak > 0)
        if seen != workers + 2:
            raise Failed(f"the memory of {seen} processes was seen, and there were {workers + 2}")
        with open(os.path.join(out, "metrics.csv")) as table:
            rows = [row for row in csv.DictReader(table) if row["samples"]]
        if len(rows) != steps:
            raise Failed(f"metrics.csv has {len(rows)} steps of {steps}")
        samples = sum(int(row["samples"]) for row in rows[warmup:])
        seconds = float(rows[-1]["seconds"]) - float(rows[warmup - 1]["seconds"])
        return {"samples_per_second": samples / seconds, "peak_bytes": sum(peaks.values())}

    def run_to_first_step(self, spec, workers, slots):
        """Seconds from the start of `lockstep run` to the end of the first step."""
        out, ended = self._folder(), []

        def look(_):
            if not ended and first_step_ended(out):
                ended.append(time.time())

        start = time.time()
        self._run(spec, FIRST_STEP, workers, slots, out, START_TIMEOUT, STEP_INTERVAL, look)
        if not ended:
            raise Failed("no first step was seen")
        return ended[0] - start

    def submit_to_first_step(self, spec, slots):
        """Seconds from the start of `lockstep submit` to the end of the first step, on a cluster that is up."""
        folder = self._folder()
        os.makedirs(folder)
        processes = []
        try:
            at = ["--coordinator", self._start_server(folder, processes)]
            processes.append(subprocess.Popen(
                [self._path("lockstep-worker"), *at, "--slots", f"cpu:{slots}", "--name", "bench", "--work-dir",
                 folder], stderr=subprocess.DEVNULL))
            deadline = time.time() + START_TIMEOUT
            while "bench" not in output_of([self._path("lockstep"), "workers", *at], COMMAND_TIMEOUT):
                if time.time() > deadline:
                    raise Failed(f"lockstep-worker did not register within {START_TIMEOUT} s")
                time.sleep(0.05)
            out = os.path.join(folder, "job")
            command = [self._path("lockstep"), "submit", spec, *at, "--out", out, *sets(FIRST_STEP)]
            start = time.time()
            submit = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            processes.append(submit)
            while not first_step_ended(out):
                if submit.poll() not in (None, 0):
                    raise Failed(last_line(submit.stderr.read()))
                if time.time() > start + START_TIMEOUT:
                    raise Failed(f"no first step within {START_TIMEOUT} s")
                time.sleep(STEP_INTERVAL)
            return time.time() - start
        finally:
            for process in reversed(processes):
                stop(process)

    def _start_server(self, folder, processes):
        """The address of a new coordinator, which is added to the processes."""
        ready, ready_end = os.pipe()
        try:
            processes.append(subprocess.Popen(
                [self._path("lockstep-server"), "--listen", "127.0.0.1:0", "--data-dir", f"{folder}/server",
                 "--ready-fd", str(ready_end)], pass_fds=[ready_end], stderr=subprocess.DEVNULL))
        finally:
            os.close(ready_end)
        with os.fdopen(ready) as pipe:
            said = select.select([pipe], [], [], START_TIMEOUT)[0]
            address = pipe.readline().strip() if said else ""
        if not address:
            raise Failed(f"lockstep-server did not start within {START_TIMEOUT} s")
        return address
