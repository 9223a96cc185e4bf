"""A whole run to 50 %: slicing at each decision, masking only, and a plain PyTorch loop that masks; by LoRAPrune's published
schedule, and by our default recipe, which no such loop has."""

import json
import sys

import shapes
from espalier_run import PUBLISHED, prune
from harness import SCRIPTS, run

DEADLINE_S = 3 * 3600
LIVE, NEVER, PLAIN = "live", "never", "plain loop"
# What the flags' defaults are, written out so that figures say what they are of, and the same in one decision.
OURS = {"criterion": "wanda", "compensation": "layer", "warmup": 0.05}
RECIPES = {
    "default": OURS | {"cooldown": 0.67, "every": 10},
    "at once": OURS | {"ramp_shape": "one-shot"},
}
# Times the steps of the published schedule.
OURS_STEPS = 2


def cases(place):
    names = [shapes.TINY.name] if place.quick else [shapes.LLAMA.name, shapes.SMOLLM2.name]
    return [*names, *(f"{name} {recipe}" for recipe in RECIPES for name in names)]


def recipe_of(case):
    """Of `RECIPES`, or LoRAPrune as published."""
    return case.partition(" ")[2] or "published"


def sides(case):
    return (LIVE, NEVER) if recipe_of(case) in RECIPES else (LIVE, NEVER, PLAIN)


def sources(place):
    scripts = [SCRIPTS / "plain_loop.py", SCRIPTS / "torch_side.py"]
    return [place.binary("espalier"), place.binary("worker"), *scripts]


def options(place):
    return {"threads": 1 if place.quick else 2, "steps": place.steps or (12 if place.quick else 30)}


def measure(case, side, place):
    shape = {shape.name: shape for shape in (shapes.LLAMA, shapes.SMOLLM2, shapes.TINY)}[case.split()[0]]
    rows, window = (2, 16) if place.quick else (4, 256)
    chosen = options(place)
    model = shapes.write_model(shape, place.scratch / "models" / shape.name)
    tokens = shapes.write_tokens(shape, place.scratch / f"{shape.name}.u16", 300_000)
    common = {"rows": rows, "window_tokens": window, "workers": 1, "threads": chosen["threads"], "shrink": side}
    common |= {"dropout": 0.0, "compute": "f32", "sparsity": 0.5}
    if ours := RECIPES.get(recipe_of(case)):
        # Longer, as decisions are ten steps apart and each is compensated.
        flags = common | ours | {"steps": OURS_STEPS * chosen["steps"]}
        return prune(place, model, tokens, place.scratch / "our-run", flags, DEADLINE_S)
    schedule = {"steps": chosen["steps"], "every": 2, "warmup": 0.1, "cooldown": 0.1, "sparsity": 0.5}
    if side == PLAIN:
        config = place.scratch / f"{shape.name}.json"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(json.dumps(shape.config()))
        flags = schedule | {"rows": rows, "window": window, "threads": chosen["threads"]}
        words = [sys.executable, SCRIPTS / "plain_loop.py", config]
        for name, value in flags.items():
            words += [f"--{name}", value]
        finished = run(words, place.scratch / "plain_loop.log", DEADLINE_S)
        said = finished.last_json()
        return {
            "train_s": said["train_s"],
            "dense_step_s": said["first_step_s"],
            "last_step_s": said["last_step_s"],
            "step_s": said["step_s"],
            "peak_resident_bytes": finished.peak_resident_bytes,
            "idle_resident_bytes": said["idle_resident_bytes"],
        }
    flags = common | schedule | PUBLISHED | {"shape": "uniform"}
    return prune(place, model, tokens, place.scratch / "run", flags, DEADLINE_S)
