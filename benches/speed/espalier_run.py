"""One `espalier prune`, and what its events and logs say of time and memory."""

import datetime
import json
import re
import shutil
import statistics

from harness import BenchError, finish, start

# Many decisions by LoRAPrune's scores, as published, whatever the default recipe is.
PUBLISHED = {"criterion": "loraprune-code", "ramp_shape": "cubic", "compensation": "none"}
LOG_LINE = re.compile(r"^(\S+Z)\s+[A-Z]+ (.*)$")


def seconds_of(time):
    return datetime.datetime.fromisoformat(time).timestamp()


def command(place, model, tokens, out, flags):
    words = [place.binary("espalier"), "prune", "--model", model, "--data", tokens, "--out", out]
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}", value]
    return words


def prune(place, model, tokens, out, flags, deadline_s):
    """The figures of a whole run. What it wrote goes, but for events and logs."""
    shutil.rmtree(out, ignore_errors=True)
    words = command(place, model, tokens, out, flags)
    log = out.with_suffix(".log")
    finished = finish(start(words, log), words, log, deadline_s)
    figures = figures_of(out) | {"wall_s": finished.wall_s, "peak_resident_bytes": finished.peak_resident_bytes}
    shutil.rmtree(out / "model", ignore_errors=True)
    return figures


def events(out):
    path = out / "events.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def log_lines(out, pattern):
    """(seconds, line) of the lines that hold `pattern`, of all processes, by time."""
    found = []
    for path in (out / "logs").glob("*.log"):
        for line in path.read_text(errors="replace").splitlines():
            said = LOG_LINE.match(line)
            if said and re.search(pattern, said[2]):
                found.append((seconds_of(said[1]), said[2]))
    return sorted(found)


def began_running(found):
    for event in found:
        if event.get("state_change", {}).get("state") == "RUN_STATE_RUNNING":
            return seconds_of(event["time"])
    return None


def median(values):
    return statistics.median(values) if values else None


def figures_of(out):
    found = events(out)
    running = began_running(found)
    steps = [(seconds_of(event["time"]), event["step"]) for event in found if "step" in event]
    decisions = [event["decision"] for event in found if "decision" in event]
    if running is None or not steps:
        raise BenchError(f"{out} holds no steps")
    duration = [float(step["duration"].rstrip("s")) for _, step in steps]
    score = [float(step["score_duration"].rstrip("s")) for _, step in steps]
    generations = [step["generation"] for _, step in steps]
    # The first step of each generation warms up; the last generation may have no other.
    settled = [place for place in range(1, len(steps)) if generations[place] == generations[place - 1]]
    dense = [duration[place] for place in settled if generations[place] == 0]
    last = [duration[place] for place in settled if generations[place] == generations[-1]] or duration[-1:]
    ended_at = {step["step"]: time for time, step in steps}
    applied = [
        max(at for at, _ in lines) - ended_at[decision["step"]]
        for decision in decisions
        if (lines := log_lines(out, rf"mask applied generation={decision['generation']}\b"))
    ]
    decided = [
        lines[0][0] - ended_at[decision["step"]]
        for decision in decisions
        if (lines := log_lines(out, rf"mask decided generation={decision['generation']}\b"))
    ]
    # From the copy aside to the manifest.
    written = [float(event["checkpoint"]["duration"].rstrip("s")) for event in found if "checkpoint" in event]
    return {
        "train_s": steps[-1][0] - running,
        "dense_step_s": median(dense),
        "last_step_s": median(last),
        "score_s": median(score),
        "step_s": duration,
        "sparsity": steps[-1][1]["sparsity"],
        "worker_peak_bytes": max(step["memory_bytes"] for _, step in steps),
        "decide_s": median(decided),
        "mask_applied_s": median(applied),
        "checkpoint_s": written[-1] if written else None,
    }
