"""`benches/speed` in small: every bench measures, keeps its samples, goes on where it was, and is written into the document."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

SPEED = REPOSITORY / "benches" / "speed"
PACKAGES = REPOSITORY / ".cache" / "bench-packages"
DEADLINE_S = 600
# By bench: what each of its samples must say, of a positive size.
SAID = {
    "step": ("step_s", "gflop_per_s", "product_gflop_per_s", "peak_resident_bytes"),
    "run": ("train_s", "dense_step_s", "last_step_s", "peak_resident_bytes"),
    "tp": ("dense_step_s", "mask_applied_s", "checkpoint_s", "decide_s"),
    "startup": ("running_s", "load_s"),
    "telemetry": ("dense_step_s",),
    "decision": ("run-global",),
    "load": ("decisions_a_second", "events_a_second", "bare_messages_a_second", "first_mask_s.median", "memory_most_bytes"),
}
SAMPLES = {"step": 3, "run": 7, "tp": 2, "startup": 2, "telemetry": 2, "decision": 1, "load": 1}

sys.path[:0] = [str(SPEED), str(PACKAGES)]


def binaries():
    """The folder with all that is measured, built last."""
    wanted = ("espalier", "worker", "coordinator", "load-bench", "examples/step")
    built = [REPOSITORY / "target" / profile for profile in ("debug", "release")]
    built = [folder for folder in built if all((folder / name).is_file() for name in wanted)]
    assert built, f"neither target/debug nor target/release has {', '.join(wanted)}: make test-interop builds them"
    return max(built, key=lambda folder: (folder / "espalier").stat().st_mtime)


def command(script, *arguments):
    return [sys.executable, str(SPEED / script), *map(str, arguments)]


def environment():
    assert (PACKAGES / "peft").is_dir(), "peft is not there: make test-interop lays it out"
    return os.environ | {"PYTHONPATH": str(PACKAGES)}


def bench_command(name, folder):
    places = ("--binaries", binaries(), "--scratch", folder / "scratch", "--results", folder / "results")
    return command("bench.py", name, "--quick", *places)


def run(words):
    done = subprocess.run(
        words, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def samples(folder, name):
    return json.loads((folder / "results" / f"{name}.json").read_text())["samples"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


@pytest.mark.parametrize("name", SAID)
def test_a_bench_measures_every_side_and_then_has_nothing_left_to_do(folder, name):
    assert f"{name}: {SAMPLES[name]} samples, 0 there" in run(bench_command(name, folder))
    found = samples(folder, name)
    assert len({(sample["case"], sample["side"]) for sample in found}) == SAMPLES[name]
    for sample in found:
        for figure in SAID[name]:
            assert sample[figure] > 0, sample
    said = run(bench_command(name, folder))
    assert f"{name}: {SAMPLES[name]} samples, {SAMPLES[name]} there" in said
    assert samples(folder, name) == found


def test_our_runs_reach_half_and_the_plain_loop_keeps_as_many_channels(folder):
    if not (folder / "results" / "run.json").is_file():
        run(bench_command("run", folder))
    events = (folder / "scratch" / "run" / "events.jsonl").read_text().splitlines()
    decisions = [event["decision"] for event in map(json.loads, events) if "decision" in event]
    assert decisions[-1]["sparsity"] == pytest.approx(0.5, abs=0.01)
    kept = json.loads((folder / "scratch" / "plain_loop.log").read_text().splitlines()[-1])["kept_channels"]
    assert kept == sum(layer["channels"] for layer in decisions[-1]["layers"])


def test_tables_and_pictures_are_written_between_the_marks_alone(folder):
    document, images = folder / "benchmarks.md", folder / "images"
    document.write_text((REPOSITORY / "docs" / "benchmarks.md").read_text())
    before = outside(document.read_text())
    run(command("docs.py", "--results", folder / "results", "--document", document, "--images", images))
    text = document.read_text()
    assert outside(text) == before
    for name in SAID:
        inner = text.split(f"<!-- bench:{name} -->\n")[1].split(f"<!-- /bench:{name} -->")[0]
        assert "| --- |" in inner or "not measured yet" in inner.lower()
        measured = (folder / "results" / f"{name}.json").is_file()
        assert measured == (f"`make bench-{name}`; " in inner)
    assert all(path.read_text().startswith("<?xml") for path in images.iterdir())
    run(command("docs.py", "--results", folder / "results", "--document", document, "--images", images))
    assert document.read_text() == text


def outside(text):
    """The document without what is generated."""
    for name in SAID:
        before, rest = text.split(f"<!-- bench:{name} -->\n")
        text = before + rest.split(f"<!-- /bench:{name} -->")[1]
    return text


def test_a_stopped_bench_leaves_no_process_and_goes_on_where_it_was(tmp_path):
    words = bench_command("startup", tmp_path)
    process = subprocess.Popen(words, cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, text=True)
    results, until = tmp_path / "results" / "startup.json", time.monotonic() + DEADLINE_S
    while not results.is_file() and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=DEADLINE_S)
    first = samples(tmp_path, "startup")
    assert not left_running(tmp_path)
    assert f"startup: 2 samples, {len(first)} there" in run(words)
    assert samples(tmp_path, "startup")[: len(first)] == first
    assert len(samples(tmp_path, "startup")) == 2


def left_running(folder):
    """Command lines of processes that name the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line:
            found.append(line)
    return found


def test_a_quick_bench_never_writes_among_the_results_that_count():
    done = subprocess.run(
        command("bench.py", "step", "--quick"), env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "--results" in done.stderr


def test_the_plain_score_is_the_formula_in_64_bits():
    import shapes
    from torch_side import BY_COLUMN, forward_backward, llama, lora_layers, micro_batches, raw_sums

    model, factors, _ = llama(shapes.TINY.config())
    with torch.no_grad():
        for factor in factors:
            factor.normal_(std=0.05)
    forward_backward(model, factors, micro_batches(shapes.TINY.vocabulary, 2, 16, 2))
    checked = 0
    for _, name, module in lora_layers(model):
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        a_gradient, b_gradient, a, b = (tensor.detach().double() for tensor in (a.grad, b.grad, a, b))
        weight = module.base_layer.weight.detach().double() + 2.0 * b @ a
        # Equation 10 of the paper as one product of rank 2 r, in the published code's absolute form.
        guided = torch.cat([b_gradient, b], 1) @ torch.cat([a - a_gradient, a_gradient], 0)
        expected = (guided * weight).abs().sum(0 if name in BY_COLUMN else 1)
        torch.testing.assert_close(raw_sums(module, name in BY_COLUMN).double(), expected, rtol=1e-4, atol=1e-9)
        checked += 1
    assert checked == 14
