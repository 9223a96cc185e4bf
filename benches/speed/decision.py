"""What the coordinator computes between the last score and the mask, at the shapes of LLaMA-7B and LLaMA-65B."""

import json
import os
import shutil

from harness import REPOSITORY, run

DEADLINE_S = 1800
SIDE = "coordinator"


def cases(place):
    return ["7b"] if place.quick else ["7b", "65b"]


def sides(_):
    return (SIDE,)


def sources(_):
    crates = [REPOSITORY / "crates" / name / "src" for name in ("pruning", "pruning-run", "sharding")]
    return sorted(path for folder in crates for path in folder.rglob("*.rs"))


def options(_):
    return {}


def measure(case, _, place):
    home = (place.scratch / "criterion").resolve()
    shutil.rmtree(home, ignore_errors=True)
    profile = ["--profile", "dev"] if place.quick else []
    quick = ["--quick"] if place.quick else []
    filters = "decision-7b/run-global" if place.quick else f"decision-{case}/"
    cargo = os.environ.get("CARGO", "cargo")
    words = ["env", f"CRITERION_HOME={home}", cargo, "bench", "--package", "benches", "--bench", "decision", "--locked"]
    run([*words, *profile, "--", "--noplot", *quick, filters], place.scratch / "decision.log", DEADLINE_S)
    figures = {}
    for path in sorted((home / f"decision-{case}").glob("*/new/estimates.json")):
        figures[path.parts[-3]] = json.loads(path.read_text())["median"]["point_estimate"] / 1e9
    return figures
