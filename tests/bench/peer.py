"""Drives torch_train.py and torch_allreduce.py: PyTorch, if this `python3` can import it."""
import importlib.util
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time

from processes import Failed, last_line, output_of

HERE = os.path.dirname(os.path.abspath(__file__))
START_TIMEOUT = 600  # seconds; a cold compilation takes tens of them
SLOWEST_STEP = 20  # seconds
IMPORT_TIMEOUT = 300  # seconds
ALL_REDUCE_TIMEOUT = 900  # seconds of all sizes between some processes


def version():
    """PyTorch's version, or None where there is none; Failed where there is one that cannot be imported."""
    if importlib.util.find_spec("torch") is None:
        return None
    return output_of([sys.executable, "-c", "import torch; print(torch.__version__)"], IMPORT_TIMEOUT).strip()


def configurations(convolutional):
    """Every one that the best is taken of: how it is compiled, laid out and placed."""
    return [{"compiled": compiled, "channels_last": channels_last, "ranks": ranks, "threads": threads}
            for compiled in (False, True)
            for channels_last in ((False, True) if convolutional else (False,))
            for ranks, threads in ((1, 2), (2, 1))]


def name(configuration):
    parts = ["compiled" if configuration["compiled"] else "eager"]
    if configuration["channels_last"]:
        parts.append("channels_last")
    parts.append("DDP 2x1" if configuration["ranks"] > 1 else "1x2")
    return " ".join(parts)


class Peer:
    """One configuration, made and warm; its processes sleep between measurements.

    parameters: how many numbers the model learns. first_step_seconds: from the start of the processes to the end
    of the first step of all of them.
    """

    def __init__(self, model, precision, configuration, batch, warmup):
        self.name, self.ranks, self.batch = name(configuration), configuration["ranks"], batch
        self.folder = tempfile.TemporaryDirectory()
        self.errors = [open(os.path.join(self.folder.name, f"stderr-{rank}"), "w+") for rank in range(self.ranks)]
        self.processes = []
        started_at = time.time()
        for rank in range(self.ranks):
            command = [sys.executable, os.path.join(HERE, "torch_train.py"), model, "--precision", precision,
                       "--batch", str(batch), "--warmup", str(warmup), "--rank", str(rank),
                       "--ranks", str(self.ranks), "--threads", str(configuration["threads"]),
                       "--rendezvous", os.path.join(self.folder.name, "rendezvous")]
            command += ["--compiled"] if configuration["compiled"] else []
            command += ["--channels-last"] if configuration["channels_last"] else []
            # Compilation in this process only: no pool of compilers beside the measurement.
            environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            self.processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                                   stderr=self.errors[rank], env=environment))
        try:
            answers = self._answers(START_TIMEOUT)
            self.first_step_seconds = max(answer["first_step_at"] for answer in answers) - started_at
            self.parameters = answers[0]["parameters"]
        except BaseException:
            self.close()
            raise

    def _answers(self, timeout):
        """One JSON line of every rank."""
        deadline, lines = time.time() + timeout, {}
        with selectors.DefaultSelector() as selector:
            for process in self.processes:
                selector.register(process.stdout, selectors.EVENT_READ)
            while len(lines) < self.ranks:
                ready = selector.select(max(0, deadline - time.time()))
                if not ready:
                    raise Failed(f"{self.name}: no answer within {timeout:.0f} s")
                for key, _ in ready:
                    line = key.fileobj.readline()
                    if not line:
                        rank = [p.stdout for p in self.processes].index(key.fileobj)
                        code = self.processes[rank].wait()
                        self.errors[rank].seek(0)
                        raise Failed(f"{self.name}: rank {rank} ended with {code}: "
                                     f"{last_line(self.errors[rank].read())}")
                    lines[key.fileobj] = json.loads(line)
                    selector.unregister(key.fileobj)
        return list(lines.values())

    def measure(self, steps):
        """Samples/s of that many steps, and the peak bytes of all ranks together so far: of all processes of the
        configuration, but for the compilers that it may have run at its start."""
        try:
            for process in self.processes:
                process.stdin.write(f"measure {steps}\n".encode())
                process.stdin.flush()
        except OSError:
            pass  # a rank that died says why where its answer is read
        answers = self._answers(60 + SLOWEST_STEP * steps)
        seconds = max(answer["seconds"] for answer in answers)
        return {"samples_per_second": steps * self.batch / seconds,
                "peak_bytes": sum(answer["peak_bytes"] for answer in answers)}

    def close(self):
        for process in self.processes:
            try:
                process.stdin.close()
            except OSError:
                pass
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        for errors in self.errors:
            errors.close()
        self.folder.cleanup()


def all_reduce(members):
    """Seconds of an all-reduce by its bytes."""
    output = output_of([sys.executable, os.path.join(HERE, "torch_allreduce.py"), str(members)], ALL_REDUCE_TIMEOUT)
    rows = [json.loads(line) for line in output.splitlines()]
    return {row["bytes"]: row["us"] * 1e-6 for row in rows}
