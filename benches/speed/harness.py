"""What every bench needs: child processes with their cost, samples that survive an interruption, the machine."""

import collections
import contextlib
import datetime
import hashlib
import json
import os
import platform
import signal
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).resolve().parent
FORMAT = 1
POLL_S = 0.02


class BenchError(Exception):
    """A bench that cannot be made, and what to do about it."""


@dataclass
class Place:
    """Where things are, and how much is measured."""

    binaries: Path
    scratch: Path
    results: Path
    quick: bool
    rounds: int
    steps: int | None = None
    minutes: float = 15

    def binary(self, name):
        path = self.binaries / name
        if not path.is_file():
            raise BenchError(f"{path} is not built: make bench builds all that benches need")
        return path


@dataclass
class Finished:
    stdout: str
    wall_s: float
    # Of the largest process among the child and its descendants.
    peak_resident_bytes: int

    def last_json(self):
        for line in reversed(self.stdout.splitlines()):
            if line.startswith("{"):
                return json.loads(line)
        raise BenchError("a script ended without its JSON line")


STARTED = []


def start(command, log):
    """A child in a process group of its own; standard output and error go to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file, held_back(signal.SIGTERM):
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        STARTED.append(process)
    return process


@contextlib.contextmanager
def held_back(number):
    """Whatever the signal's handler does, it does after the block: a child that has been started is known by then."""
    came = []
    before = signal.signal(number, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(number, before)
        if came:
            signal.raise_signal(number)


def stop_all():
    """Ends all children that have not ended."""
    for process in STARTED:
        stop(process)


def wait(process, deadline_s):
    """(exit code, resource usage), or None when the deadline passes first."""
    until = time.monotonic() + deadline_s
    while time.monotonic() < until:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, usage
        time.sleep(POLL_S)
    return None


def stop(process):
    """Ends a child and its group: politely, then not."""
    for sent, patience_s in ((signal.SIGINT, 20), (signal.SIGKILL, 20)):
        if process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sent)
        with contextlib.suppress(ChildProcessError):
            wait(process, patience_s)


def finish(process, command, log, deadline_s):
    try:
        started = time.monotonic()
        ended = wait(process, deadline_s)
    except BaseException:
        stop(process)
        raise
    words = " ".join(str(word) for word in command)
    if ended is None:
        stop(process)
        raise BenchError(f"not done after {deadline_s:.0f} s: {words}\n{log.read_text(errors='replace')[-2000:]}")
    code, usage = ended
    stdout = log.read_text(errors="replace")
    if code != 0:
        raise BenchError(f"exit {code}: {words}\n{stdout[-3000:]}")
    return Finished(stdout, time.monotonic() - started, usage.ru_maxrss * 1024)


def run(command, log, deadline_s):
    return finish(start(command, log), command, log, deadline_s)


# Samples -----------------------------------------------------------------------------------------------------------------


def machine():
    facts = {"kernel": platform.release(), "cores": len(os.sched_getaffinity(0))}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            facts["processor"] = line.split(":", 1)[1].strip()
            break
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal"):
            facts["memory_bytes"] = int(line.split()[1]) * 1024
    return facts


def digest_of(paths):
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def commit():
    said = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return said.stdout.strip() or None


class Results:
    """A bench's samples, in one JSON file. What is there and was made by the same build and options is not made again."""

    def __init__(self, path, bench, build, options):
        self.path = path
        self.value = {"format": FORMAT, "bench": bench, "build": build, "options": options, "samples": []}
        if path.is_file():
            there = json.loads(path.read_text())
            if all(there.get(key) == self.value[key] for key in ("format", "bench", "build", "options")):
                self.value = there
        self.value |= {"machine": machine()}

    def has(self, case, side, round_index):
        key = (case, side, round_index)
        return any((one["case"], one["side"], one["round"]) == key for one in self.value["samples"])

    def add(self, case, side, round_index, figures):
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        sample = {"case": case, "side": side, "round": round_index, "time": now, "commit": commit(), "load": os.getloadavg()[0]}
        self.value["samples"].append(sample | figures)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        # A line for each sample.
        head = json.dumps({key: value for key, value in self.value.items() if key != "samples"}, indent=1)
        samples = ",\n  ".join(json.dumps(sample) for sample in self.value["samples"])
        unfinished.write_text(f'{head[:-2]},\n "samples": [\n  {samples}\n ]\n}}\n')
        unfinished.rename(self.path)


class Figures:
    """Results that were read, as medians over the rounds."""

    def __init__(self, value):
        self.value = value
        self.samples = value["samples"]

    @classmethod
    def read(cls, path):
        return cls(json.loads(path.read_text())) if path.is_file() else None

    def cases(self):
        return list(dict.fromkeys(sample["case"] for sample in self.samples))

    def all(self, case, side, name):
        found = [sample for sample in self.samples if (sample["case"], sample["side"]) == (case, side)]
        return [sample[name] for sample in found if sample.get(name) is not None]

    def median(self, case, side, name):
        values = self.all(case, side, name)
        return statistics.median(values) if values else None

    def ratio(self, case, over, under, name):
        above, below = self.median(case, over, name), self.median(case, under, name)
        return above / below if above is not None and below else None

    def rounds(self):
        """How many samples each figure has: `3`, or `1 to 3`."""
        counts = collections.Counter((sample["case"], sample["side"]) for sample in self.samples).values()
        least, most = min(counts, default=0), max(counts, default=0)
        return f"{most}" if least == most else f"{least} to {most}"

    def provenance(self):
        machine_facts = self.value["machine"]
        days = sorted({sample["time"][:10] for sample in self.samples})
        commits = list(dict.fromkeys(sample["commit"] for sample in self.samples if sample["commit"]))
        memory = machine_facts.get("memory_bytes", 0) / 2**30
        days = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        processor = machine_facts.get("processor", "unknown processor")
        return (
            f"{days}, {machine_facts['cores']} cores of {processor}, {memory:.0f} GiB, "
            f"{'one round' if self.rounds() == '1' else f'medians of {self.rounds()} interleaved rounds'}, commit {', '.join(commits) or 'unknown'}"
        )
