"""One optimizer step: ours against PyTorch + transformers + peft."""

import json
import sys

import shapes
from harness import SCRIPTS, run

DEADLINE_S = 3600
THREADS = 2
# Micro-batches of 4 x 256 tokens.
TOKENS = {"1k": 1, "16k": 16}
# The score that the straight PyTorch form computes too.
CRITERION = '{"kind": "lora_prune", "form": "code"}'
OURS, PEFT, SCORED = "ours", "peft", "peft with the score"


def cases(place):
    if place.quick:
        return [f"{shapes.TINY.name} 1k"]
    return [f"{shape.name} {tokens}" for shape in (shapes.LLAMA, shapes.SMOLLM2) for tokens in TOKENS]


def sides(case):
    # The score does not grow with the tokens: one size tells all.
    return (OURS, PEFT, SCORED) if case.endswith(" 1k") else (OURS, PEFT)


def sources(place):
    return [place.binary("examples/step"), SCRIPTS / "peft_step.py", SCRIPTS / "torch_side.py"]


def options(place):
    return {"threads": 1 if place.quick else THREADS, "steps": place.steps or (2 if place.quick else 3)}


def shape_of(case):
    return {shape.name: shape for shape in (shapes.LLAMA, shapes.SMOLLM2, shapes.TINY)}[case.split()[0]]


def measure(case, side, place):
    shape, micro = shape_of(case), TOKENS[case.split()[1]]
    chosen = options(place)
    steps = chosen["steps"] if micro == 1 else 1
    rows, window = (2, 32) if place.quick else (4, 256)
    common = ["--rows", rows, "--window", window, "--micro", micro, "--threads", chosen["threads"], "--steps", steps]
    log = place.scratch / "step.log"
    if side == OURS:
        words = [place.binary("examples/step"), "--random", shape.widths, "--criterion", CRITERION, *common]
        words += ["--tied"] if shape.tied else []
    else:
        config = place.scratch / f"{shape.name}.json"
        write_config(shape, config)
        words = [sys.executable, SCRIPTS / "peft_step.py", config, *common, *(["--score"] if side == SCORED else [])]
    finished = run(words, log, DEADLINE_S)
    said = finished.last_json()
    tokens = rows * window * micro
    score_s = said["phases"]["scores_s"] if side == OURS else said.get("score_s")
    return {
        "tokens": tokens,
        "weights": shape.weights_in_products,
        "step_s": said["step_s"],
        "step_cpu_s": said["step_cpu_s"],
        "score_s": score_s,
        "phases": said.get("phases"),
        "gflop_per_s": 4 * shape.weights_in_products * tokens / said["step_s"] / 1e9,
        "product_gflop_per_s": said["product_gflop_per_s"],
        "peak_resident_bytes": finished.peak_resident_bytes,
        "idle_resident_bytes": said.get("idle_resident_bytes"),
    }


def write_config(shape, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(shape.config()))
