"""Child processes of the benchmark: their output, their end and their memory."""
import os
import signal
import subprocess

STOP_TIMEOUT = 15  # seconds; `lockstep run` ends its cluster in that time


class Failed(Exception):
    """A configuration that gave no figure; the text says why, in one line."""


def last_line(text):
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"


def output_of(command, timeout):
    """What a command prints; Failed where it does not end well within so many seconds."""
    name = os.path.basename(command[0])
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          start_new_session=True) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise Failed(f"{name} did not end within {timeout} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
    if process.returncode != 0:
        raise Failed(f"{name} ended with {process.returncode}: {last_line(errors)}")
    return output


def stop(process):
    """Asks it to end, and makes it where it does not."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def peak_bytes(pid):
    """The most memory that a process has held so far; 0 where it is gone."""
    try:
        with open(f"/proc/{pid}/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return 1024 * int(line.split()[1])
    except OSError:
        pass
    return 0


def children_of(pid):
    """The processes that the main thread of a process has started."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as children:
            return [int(child) for child in children.read().split()]
    except OSError:
        return []
