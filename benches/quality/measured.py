"""Runs one command to its end and says what it cost: wall time, CPU time and peak memory of all its processes."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from dataclasses import dataclass

POLL_S = 0.1
STOP_DEADLINE_S = 20
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)


def end_with_parent(signal_number=signal.SIGTERM):
    """Has the kernel signal this process when its parent is gone."""
    if _libc.prctl(PR_SET_PDEATHSIG, signal_number) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


@dataclass
class Cost:
    wall_s: float
    # User and system time of the command and all processes that it started and waited for.
    cpu_s: float
    # High-water mark of resident memory: of the command itself, and of the fullest process that it started.
    peak_command_bytes: int
    peak_child_bytes: int


class CommandError(Exception):
    """A command that failed or took too long; the message holds the end of what it said."""


def measured(command, *, log, deadline_s, environment=None):
    """Standard output of `command`, which must succeed, and its cost. Standard error is added to the file `log`."""
    start = time.monotonic()
    with open(log, "ab") as errors:
        errors.write(("$ " + " ".join(command) + "\n").encode())
        errors.flush()
        begin = errors.tell()
        out = log.with_suffix(".stdout")
        with open(out, "wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env=environment,
                # This process has one thread, so code between fork and exec is safe.
                preexec_fn=end_with_parent,
            )
        peaks = {"command": 0, "child": 0}
        try:
            while True:
                peaks["command"] = max(peaks["command"], _peak_bytes(process.pid))
                for child in _children(process.pid):
                    peaks["child"] = max(peaks["child"], _peak_bytes(child))
                ended, status, usage = os.wait4(process.pid, os.WNOHANG)
                if ended:
                    process.returncode = os.waitstatus_to_exitcode(status)
                    break
                if time.monotonic() - start > deadline_s:
                    raise CommandError(f"not done after {deadline_s} s: {' '.join(command)}")
                time.sleep(POLL_S)
        finally:
            _end(process)
    wall_s = time.monotonic() - start
    said = out.read_text(errors="replace")
    out.unlink()
    if process.returncode != 0:
        errors = log.read_bytes()[begin:].decode(errors="replace")
        raise CommandError(f"exit {process.returncode}: {' '.join(command)}\n{said[-1000:]}{errors[-3000:]}".strip())
    return said, Cost(wall_s, usage.ru_utime + usage.ru_stime, peaks["command"], peaks["child"])


def _end(process):
    if process.returncode is not None:
        return
    process.terminate()
    try:
        process.wait(STOP_DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _peak_bytes(pid):
    """VmHWM of a process; 0 when it has ended."""
    with contextlib.suppress(OSError):
        with open(f"/proc/{pid}/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    return 0


def _children(pid):
    """Processes that `pid` has started, of all its threads."""
    found = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                with open(f"/proc/{pid}/task/{thread}/children") as children:
                    found += [int(child) for child in children.read().split()]
    return found
