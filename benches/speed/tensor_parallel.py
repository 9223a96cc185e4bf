"""Two workers of one thread each against one worker of two threads."""

import shapes
from espalier_run import PUBLISHED, prune

DEADLINE_S = 3600
ONE, TWO = "1 worker x 2 threads", "2 workers x 1 thread"


def cases(place):
    if place.quick:
        return [f"{shapes.TINY.name} 1k"]
    return [f"{shape.name} {tokens}" for shape in (shapes.LLAMA, shapes.SMOLLM2) for tokens in ("1k", "4k")]


def sides(_):
    return ONE, TWO


def sources(place):
    return [place.binary("espalier"), place.binary("worker")]


def options(place):
    return {"steps": place.steps or 8}


def measure(case, side, place):
    name, tokens = case.split()
    shape = {shape.name: shape for shape in (shapes.LLAMA, shapes.SMOLLM2, shapes.TINY)}[name]
    rows, window = (2, 16) if place.quick else (4, 256)
    model = shapes.write_model(shape, place.scratch / "models" / shape.name)
    data = shapes.write_tokens(shape, place.scratch / f"{shape.name}.u16", 300_000)
    workers, threads = (1, 2) if side == ONE else (2, 1)
    flags = {
        "workers": workers,
        "threads": threads,
        "steps": options(place)["steps"],
        "rows": rows,
        "window_tokens": window,
        "micro_batches": {"1k": 1, "4k": 4}[tokens],
        # All at the same width until nearly the end, then one decision.
        "warmup": 0.7,
        "cooldown": 0.1,
        "every": 100,
        "sparsity": 0.5,
        "dropout": 0.0,
        "compute": "f32",
    }
    flags |= PUBLISHED
    return prune(place, model, data, place.scratch / "tp", flags, DEADLINE_S)
