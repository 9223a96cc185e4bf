"""`benches/quality` end to end on a tiny model and tiny text: cells, resuming, table."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import DEADLINE_S, REPOSITORY, run

BENCH = REPOSITORY / "benches" / "quality"
MODEL = REPOSITORY / "tests" / "fixtures" / "models" / "stories260k"
STORIES = REPOSITORY / "tests" / "fixtures" / "text" / "tinystories.txt"
DENSE_PARAMETERS = 260_032

sys.path.insert(0, str(BENCH))


def binaries():
    """The folder of the programs built last."""
    built = [REPOSITORY / "target" / profile for profile in ("debug", "release")]
    built = [folder for folder in built if (folder / "espalier").is_file() and (folder / "worker").is_file()]
    assert built, "neither target/debug nor target/release has espalier and worker: build first"
    return max(built, key=lambda folder: (folder / "espalier").stat().st_mtime)


def question(task):
    if task == "winogrande":
        return {"context_options": ["Tom was happy and Tom", "Tom was happy and Sue"], "continuation": " ran.", "gold": 0}
    return {"query": "Once upon a", "choices": ["time", "stone"], "gold": 0}


class Bench:
    """A setting, recipes and texts so small that a cell takes a second."""

    def __init__(self, folder, rows, windows):
        self.folder = folder
        self.rows = rows
        self.results = folder / "results"
        self.document = folder / "docs" / "results.md"
        setting = (BENCH / "setting.toml").read_text()
        tiny = {"steps": 6, "window_tokens": 32, "windows": windows, "max_tokens": 1024, "limit": 1}
        for name, value in tiny.items():
            setting, found = re.subn(rf"^{name} = .*$", f"{name} = {value}", setting, flags=re.MULTILINE)
            assert found, f"setting.toml has no `{name}`"
        (folder / "setting.toml").write_text(setting)
        (folder / "recipes").mkdir()
        for recipe in (BENCH / "recipes").glob("*.yaml"):
            text = re.sub(r"warmup_steps: \d+", "warmup_steps: 1", recipe.read_text())
            (folder / "recipes" / recipe.name).write_text(text)
        self._lay_out_texts(folder / "data")

    def _lay_out_texts(self, data):
        stories = STORIES.read_text().split("<|endoftext|>")
        for name, part in (("c4", stories[:40]), ("wikipedia", stories[40:60])):
            (data / name).mkdir(parents=True)
            lines = (json.dumps({"text": story}) + "\n" for story in part)
            (data / name / "train.jsonl").write_text("".join(lines))
        for name, part in (("wikitext2/test_a.raw.txt", stories[60:80]), ("ptb/ptb.test_a.txt", stories[80:100])):
            (data / name).parent.mkdir()
            (data / name).write_text("".join(part))
        (data / "zeroshot").mkdir()
        for task in ("boolq", "piqa", "hellaswag", "winogrande", "arc_e", "arc_c", "obqa"):
            (data / "zeroshot" / f"{task}.jsonl").write_text(json.dumps(question(task)) + "\n")

    def _common(self):
        return ("--setting", self.folder / "setting.toml", "--recipes", self.folder / "recipes", "--results", self.results)

    def command(self, *arguments, out="out"):
        places = ("--data", self.folder / "data", "--model", MODEL, "--out", self.folder / out, "--binaries", binaries())
        rows = ("--rows", ",".join(self.rows), "--seeds", "0", "--sparsity", "0.5")
        words = (sys.executable, BENCH / "run.py", *places, *self._common(), *rows, *arguments)
        return [str(word) for word in words]

    def make(self, *arguments):
        done = run(*self.command(*arguments))
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def table(self):
        done = run(sys.executable, BENCH / "table.py", *self._common(), "--document", self.document, "--no-picture")
        assert done.returncode == 0, done.stderr
        return self.document.read_text(), done.stderr


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    made = Bench(tmp_path_factory.mktemp("quality"), rows=("dense", "dense-lora", "oneshot-taylor", "ours"), windows=[32, 64])
    made.said = made.make()
    return made


def test_each_cell_is_a_file_with_what_was_measured(bench):
    assert bench.said.startswith("4 cells, 0 there, 4 to make")
    cells = {path.stem: json.loads(path.read_text()) for path in bench.results.iterdir()}
    assert set(cells) == {"dense", "dense-lora-seed0", "oneshot-taylor-50-seed0", "ours-50-seed0"}
    for cell in cells.values():
        assert set(cell["evaluations"]) == {"wikitext2@32", "wikitext2@64", "ptb@32", "ptb@64", "zeroshot"}
        assert cell["evaluations"]["wikitext2@32"]["said"]["predicted_tokens"] == 1024 - 1024 // 32
    oneshot = cells["oneshot-taylor-50-seed0"]["prune"]
    assert oneshot["pruning_steps"] == [4]
    assert oneshot["parameters"] == cells["ours-50-seed0"]["prune"]["parameters"] < DENSE_PARAMETERS
    assert oneshot["peak_worker_bytes"] > oneshot["peak_coordinator_bytes"] > 1 << 20
    assert oneshot["wall_s"] > 0.1 and oneshot["cpu_s"] > 0.1
    assert cells["dense"]["prune"] == {"parameters": DENSE_PARAMETERS}
    assert cells["dense-lora-seed0"]["prune"]["parameters"] == DENSE_PARAMETERS
    dense = cells["dense"]["evaluations"]["wikitext2@64"]["said"]["perplexity"]
    assert 2 < dense < cells["oneshot-taylor-50-seed0"]["evaluations"]["wikitext2@64"]["said"]["perplexity"]


def test_what_is_there_is_not_made_again_and_weights_are_gone(bench):
    assert "0 to make" in bench.make()
    assert not list((bench.folder / "out" / "cells").rglob("*.safetensors"))


def test_a_results_file_names_no_path_of_the_machine(bench):
    for path in bench.results.iterdir():
        assert str(bench.folder) not in path.read_text() and str(REPOSITORY) not in path.read_text()


def test_the_table_shows_figures_and_calls_the_rest_missing(bench):
    text, said = bench.table()
    assert said == ""
    lines = {line.split(" | ")[0]: line for line in text.split("## 50 %")[1].split("\n## ")[0].splitlines()}
    cell = json.loads((bench.results / "ours-50-seed0.json").read_text())
    perplexity = cell["evaluations"]["wikitext2@32"]["said"]["perplexity"]
    assert f"| {perplexity:.2f} |" in text
    assert lines["| LoRAPrune, `code` form"].count("missing") == 4
    assert "| one-shot `taylor` + LoRA (LLM-Pruner) | 1.000 | 1.000 | 1.000 | 1.000 |" in text
    assert "espalier prune --model MODEL --recipe benches/quality/recipes/ours.yaml" in text


def test_a_changed_recipe_makes_its_cells_stale(bench):
    recipe = bench.folder / "recipes" / "ours.yaml"
    before = recipe.read_text()
    try:
        recipe.write_text(before + "# a comment changes nothing\n")
        assert "4 there" in bench.make("--dry-run")
        recipe.write_text(before.replace("alpha: 16", "alpha: 8"))
        said = bench.make("--dry-run")
        assert "3 there, 1 to make" in said and "anew     ours-50-seed0" in said
        text, warned = bench.table()
        assert "ours-50-seed0" in warned and "| ours | missing |" in text
    finally:
        recipe.write_text(before)


def test_a_recipe_that_cannot_run_is_refused_before_any_cell(bench):
    recipe = bench.folder / "recipes" / "ours.yaml"
    before = recipe.read_text()
    try:
        recipe.write_text(before.replace("rank: 8", "rank: 0"))
        done = run(*bench.command())
        assert done.returncode == 2 and "`ours` cannot run" in done.stderr and "lora.rank" in done.stderr
    finally:
        recipe.write_text(before)


def test_a_killed_call_leaves_no_half_cell_and_no_process(tmp_path):
    bench = Bench(tmp_path, rows=("ours",), windows=[32])
    process = subprocess.Popen(bench.command(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: list(tmp_path.glob("out/cells/*/run/logs/worker-0.log")), "no run began")
        assert pids_below(tmp_path / "out" / "bin")
    finally:
        process.kill()
        process.wait(DEADLINE_S)
    wait_until(lambda: not pids_below(tmp_path / "out" / "bin"), "processes were left running")
    assert not list(tmp_path.glob("results/.*"))
    bench.make()
    assert [path.name for path in bench.results.iterdir()] == ["ours-50-seed0.json"]


def pids_below(folder):
    """Processes whose program lies in `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                program = os.readlink(entry / "exe")
            except OSError:
                continue
            if Path(program).is_relative_to(folder):
                found.append(int(entry.name))
    return found


def wait_until(holds, otherwise):
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)


def test_the_schedule_begins_with_a_whole_table():
    from setting import Setting

    setting = Setting.read()
    names = [cell.name for cell in setting.schedule(setting.rows, [0.5, 0.2], [0, 1, 2])]
    assert names[:3] == ["dense", "dense-lora-seed0", "loraprune-code-50-seed0"]
    ablations = [row for row in setting.rows if row.ablation]
    assert len(names) == len(set(names)) == 1 + 3 + 9 * 2 * 3 + len(ablations)
    first_of = {part: min(i for i, name in enumerate(names) if part in name) for part in ("50-seed0", "20-seed0", "seed1", "seed2")}
    assert list(first_of.values()) == sorted(first_of.values())
    last_of_seed_0 = max(i for i, name in enumerate(names) if name.endswith("seed0"))
    assert last_of_seed_0 < first_of["seed1"]


@pytest.mark.parametrize(("values", "shown"), [([], "missing"), ([2.0], "2.0"), ([1.0, 3.0], "2.0 ± 1.4"), ([2.0, 2.0], "2.0")])
def test_a_spread_is_mean_and_sample_deviation(values, shown):
    from table import spread

    assert spread(values, "{:.1f}") == shown
