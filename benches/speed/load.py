"""Load on a coordinator: simulated workers, a thousand clients that are cut off again and again, bare tonic beside them."""

from harness import run

SIDE = "coordinator"
DECISIONS, EVENTS, SOAK, QUICK = "decisions", "events", "soak", "quick"
# A step of a model of 65B parameters takes longer than this on any machine.
SOAK_STEP_S = 2
SMALL = ("--layers", 2, "--hidden", 512, "--heads", 8, "--channels", 1024, "--workers", 2)


def cases(place):
    return [QUICK] if place.quick else [DECISIONS, EVENTS, SOAK]


def sides(_):
    return (SIDE,)


def sources(place):
    return [place.binary("coordinator"), place.binary("load-bench")]


def options(place):
    return {"minutes": place.minutes}


def measure(case, _, place):
    soak_s = 60 * place.minutes
    flags = {
        DECISIONS: ["--steps", 120],
        EVENTS: [*SMALL, "--steps", 3000, "--every", 10, "--cut-every", 1000],
        SOAK: ["--seconds", soak_s, "--steps", round(soak_s / SOAK_STEP_S), "--flat"],
        QUICK: [*SMALL, "--steps", 20, "--watchers", 20, "--connections", 4, "--cut-every", 10],
    }[case]
    words = [place.binary("load-bench"), "--scratch", place.scratch / "load", *flags]
    return flat(run(words, place.scratch / "load.log", 1800 + soak_s).last_json())


def flat(figures):
    """`{"a": {"b": 1}, "c": [2]}` as `{"a.b": 1, "c.0": 2}`."""
    found = {}
    for name, value in figures.items():
        parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        found |= {name: value} if parts is None else {f"{name}.{part}": of_part for part, of_part in parts}
    return found
