"""One cell of the table: prune, measure, write one JSON file. Everything that is done half counts as not done."""

import hashlib
import json
import math
import os
import platform
import shutil
import struct
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from measured import measured
from setting import REPOSITORY, Cell, Setting, SettingError

FORMAT = 1
PRUNE_DEADLINE_S = 12 * 3600
EVAL_DEADLINE_S = 4 * 3600


@dataclass(frozen=True)
class Place:
    """Where things are: binaries, model, data, scratch folders and results."""

    binaries: Path
    model: Path
    data: Path
    out: Path
    results: Path
    threads: int
    keep: bool
    with_zeroshot: bool
    parallel: int

    @property
    def espalier(self):
        return self.binaries / "espalier"

    def environment(self):
        """The copied binaries find libtorch by this, wherever they are."""
        libraries = [str(REPOSITORY / ".libtorch" / "torch" / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
        return {**os.environ, "LD_LIBRARY_PATH": ":".join(part for part in libraries if part)}


def read_json(path):
    """What a file holds; nothing when it is not there."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def write_json(path, value):
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    os.replace(part, path)


def inputs(setting: Setting, place: Place):
    """Which model and texts: cells of one table must have the same."""
    files = {f"model/{name}": place.model / name for name in ("config.json", "tokenizer.json")}
    texts = [*setting.texts, *(text.text for text in setting.perplexity)]
    files |= {text: place.data / text for text in texts}
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        raise SettingError(f"these files are not there: {', '.join(missing)}")
    weights = sorted(place.model.glob("*.safetensors"))
    if not weights:
        raise SettingError(f"{place.model} has no *.safetensors")
    found = {name: _digest(path) for name, path in files.items()}
    return {**found, "weight_bytes": sum(path.stat().st_size for path in weights)}


def parameter_count(model):
    """Parameters of a checkpoint by the headers of its weight files."""
    count = 0
    for path in sorted(model.glob("*.safetensors")):
        with open(path, "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        count += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return count


def result_path(cell: Cell, place: Place):
    return place.results / f"{cell.name}.json"


def is_done(cell: Cell, setting: Setting, place: Place, found_inputs):
    """Whether the cell's file holds all that is wanted now, made by the recipe and setting of now."""
    result = read_json(result_path(cell, place))
    if result is None or result["format"] != FORMAT:
        return False
    same = result["training"] == setting.training_of(cell) and result["inputs"] == found_inputs
    wanted = setting.evaluations(place.with_zeroshot)
    return same and all(_is_measured(result["evaluations"], name, how) for name, how in wanted.items())


def _is_measured(evaluations, name, how):
    return name in evaluations and evaluations[name]["how"] == how


def make(cell: Cell, setting: Setting, place: Place, found_inputs):
    """Prunes and measures; what an earlier call has finished of this cell is taken over."""
    folder = place.out / "cells" / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    state_path = folder / "cell.json"
    identity = {
        "format": FORMAT,
        "row": cell.row.name,
        "sparsity": cell.sparsity,
        "seed": cell.seed,
        "training": setting.training_of(cell),
        "inputs": found_inputs,
    }
    state = read_json(state_path)
    model = folder / "run" / "model" if cell.row.trained else place.model
    if state is None or any(state[key] != value for key, value in identity.items()) or not model.is_dir():
        shutil.rmtree(folder)
        folder.mkdir()
        state = {**identity, "evaluations": {}, "prune": _prune(cell, setting, place, folder)}
        state["made"] = _made(place)
        write_json(state_path, state)
    log = folder / "log.txt"
    common = {"espalier": place.espalier, "model": model, "data": place.data, "threads": place.threads}
    commands = {
        text.at(window): setting.perplexity_arguments(text, window, **common)
        for text in setting.perplexity
        for window in text.windows
    }
    commands["zeroshot"] = setting.zeroshot_arguments(**common)
    wanted = setting.evaluations(place.with_zeroshot)
    for name, how in wanted.items():
        if not _is_measured(state["evaluations"], name, how):
            state["evaluations"][name] = {"how": how, **_evaluate(commands[name], log, place)}
            write_json(state_path, state)
    write_json(result_path(cell, place), {**state, "evaluations": {name: state["evaluations"][name] for name in wanted}})
    if cell.row.trained and not place.keep:
        shutil.rmtree(folder / "run" / "model")
        shutil.rmtree(folder / "run" / "state", ignore_errors=True)


def _prune(cell, setting, place, folder):
    """Runs `espalier prune`; what it cost and what came out."""
    if not cell.row.trained:
        return {"parameters": parameter_count(place.model)}
    out = folder / "run"
    command = setting.prune_arguments(
        cell,
        espalier=place.espalier,
        model=place.model,
        data=place.data,
        out=out,
        recipe=cell.row.recipe,
        threads=place.threads,
    )
    _, cost = measured(command, log=folder / "log.txt", deadline_s=PRUNE_DEADLINE_S, environment=place.environment())
    run = json.loads((out / "run.json").read_text())
    plan, step, export = run["plan"], run["last_step"], run["export_result"]
    padded = "padded" in plan["export_form"]
    return {
        "wall_s": cost.wall_s,
        "cpu_s": cost.cpu_s,
        "peak_worker_bytes": cost.peak_child_bytes,
        "peak_coordinator_bytes": cost.peak_command_bytes,
        # Of a padded export the plan knows what stays; of the others, what was written.
        "parameters": plan["pruned_parameters"] if padded else export["parameters"],
        "parameters_written": export["parameters"],
        "removed": plan["sparsity"],
        "pruning_steps": plan["pruning_steps"],
        "last_loss": step["loss"],
        # All of it, defaults included, as the run itself says.
        "recipe": run["spec"]["recipe"],
        "mean_kl_of_export": export["mean_kl"],
    }


def _evaluate(command, log, place):
    said, cost = measured(command, log=log, deadline_s=EVAL_DEADLINE_S, environment=place.environment())
    # Results are published; where the files lay is not.
    for path, name in ((place.data, "DATA"), (place.out, "OUT"), (place.model, "MODEL")):
        said = said.replace(str(path), name)
    return {"said": json.loads(said), "wall_s": cost.wall_s, "cpu_s": cost.cpu_s}


def _made(place):
    commit = subprocess.run(
        ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit,
        "programs": _digest(place.binaries / "espalier", place.binaries / "worker"),
        "processor": _processor(),
        "threads": place.threads,
        "parallel": place.parallel,
    }


def _digest(*paths):
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _processor():
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()
