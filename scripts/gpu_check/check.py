#!/usr/bin/env python3
"""Checks and measures Espalier on a GPU, from an unpacked archive of `make gpu-check`.

    check.py [--device cuda:0] [--out results.json]

Needs Python 3.9, an NVIDIA GPU and PyTorch 2.11 (`python3 -c 'import torch'`); transformers and peft for the comparison.
Runs one after the other, each in a process of its own with a deadline: is the device there, one rank of NCCL, a small
pruning run against the CPU's in f32 and bf16, the same on two ranks that share the device, `espalier prune` with real
services, then steps at the shapes of LLaMA-7B. Prints one table, writes JSON, and ends with 1 if a check failed.
A measurement that misses its goal is marked, and is no failure.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
LLAMA_7B = "4096,32,32,32,11008,32000"
H200_TFLOP_PER_S = 989.0
PROBE_DEADLINE_S = 180
RUN_DEADLINE_S = 300
PRUNE_DEADLINE_S = 600
STEP_DEADLINE_S = 900
# Losses of the small run, relative to the CPU's in f32.
F32_BOUND = 1e-3
BF16_BOUND = 3e-2
# Goals at the shapes of 7B, for an H200: useful FLOP, and memory at one window of 512 tokens.
MFU_GOAL = 0.5
SCORE_SHARE_GOAL = 0.02
PEAK_GOALS = {"bf16": 16e9, "int8": 10e9}


def library_folders(libtorch):
    """Where libtorch and NVIDIA's libraries lie, for LD_LIBRARY_PATH."""
    if libtorch is None:
        asked = "import torch, os; print(torch.__version__); print(os.path.join(os.path.dirname(torch.__file__), 'lib'))"
        done = subprocess.run(
            [sys.executable, "-c", asked], capture_output=True, text=True, timeout=PROBE_DEADLINE_S, check=False
        )
        if done.returncode != 0:
            sys.exit(f"{sys.executable} cannot import torch; install torch 2.11, or pass --libtorch DIR\n{done.stderr}")
        version, libtorch = done.stdout.split()[:2]
        if not version.startswith("2.11."):
            sys.exit(f"the binaries were built against libtorch 2.11; {sys.executable} has torch {version}")
    folder = Path(libtorch).resolve()
    if not (folder / "libtorch_cpu.so").is_file():
        sys.exit(f"{folder} has no libtorch_cpu.so; pass the `lib` folder of torch 2.11 as --libtorch")
    return [folder, *sorted((folder / "../../nvidia").resolve().glob("*/lib"))]


class Machine:
    """Runs the packed programs."""

    def __init__(self, folders, threads):
        self.environment = dict(os.environ)
        before = self.environment.get("LD_LIBRARY_PATH")
        paths = [str(folder) for folder in folders] + ([before] if before else [])
        self.environment["LD_LIBRARY_PATH"] = ":".join(paths)
        self.threads = str(threads)

    def run(self, deadline_s, *command):
        """Status and output of a program; a deadline that passes is a status too."""
        words = [str(word) for word in command]
        try:
            done = subprocess.run(
                words,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=deadline_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return 124, "", f"no end within {deadline_s} s: {' '.join(words)}"
        return done.returncode, done.stdout, done.stderr

    def ask(self, deadline_s, question, *arguments):
        """The answer of the program `gpu_check`, or {"error": why}."""
        words = [HERE / "bin/gpu_check", question, *arguments]
        if question != "probe":
            words += ["--threads", self.threads]
        status, out, problems = self.run(deadline_s, *words)
        if status != 0:
            return {"error": problems.strip()[-2000:] or f"status {status}"}
        try:
            return json.loads(out.strip().splitlines()[-1])
        except (IndexError, ValueError):
            return {"error": f"no JSON in {out[-500:]!r}"}


def difference(losses, expected):
    return max(abs(one - other) / abs(other) for one, other in zip(losses, expected))


def overlap(masks, expected):
    """Share of the groups kept at the end that both keep."""
    kept = [
        {(layer, kind, unit) for layer, keep in enumerate(each[-1]) for kind in keep for unit in keep[kind]}
        for each in (masks, expected)
    ]
    return len(kept[0] & kept[1]) / max(len(kept[1]), 1)


class Report:
    """Rows of the table: what, how it came out, and whether that is well."""

    def __init__(self):
        self.rows = []
        self.failed = False

    def check(self, what, holds, found):
        self.rows.append((what, found, "ok" if holds else "FAILED"))
        self.failed |= not holds

    def measured(self, what, found, meets=None):
        self.rows.append((what, found, {None: "", True: "goal met", False: "goal missed"}[meets]))

    def table(self):
        widths = [max(len(row[column]) for row in self.rows) for column in range(3)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in self.rows)


def parity(machine, report, device, results):
    """The small run on the device against the CPU's; then on two ranks."""
    model = ["--model", HERE / "model"]
    cpu = results["cpu f32"] = machine.ask(RUN_DEADLINE_S, "run", *model, "--device", "cpu")
    if "error" in cpu:
        report.check("small run on the CPU", False, cpu["error"])
        return
    cases = [
        ("f32", ["--device", device], F32_BOUND, 0.999),
        ("f32, int8 base", ["--device", device, "--storage", "int8"], None, None),
        ("f32, nf4 base", ["--device", device, "--storage", "nf4"], None, None),
        ("f32, 2 ranks by Gloo", ["--device", device, "--ranks", "2"], F32_BOUND, 0.999),
    ]
    if device != "cpu":
        bf16 = ["--device", device, "--compute", "bf16", "--storage", "bf16"]
        cases.append(("bf16", bf16, BF16_BOUND, 0.8))
        cases.append(("bf16, 2 ranks by Gloo", [*bf16, "--ranks", "2"], BF16_BOUND, 0.8))
    for name, arguments, bound, least_overlap in cases:
        expected = cpu
        if bound is None:
            storage = arguments[-1]
            bound, least_overlap = F32_BOUND, 0.999
            on_cpu = ["--device", "cpu", "--storage", storage]
            expected = results[f"cpu {storage}"] = machine.ask(RUN_DEADLINE_S, "run", *model, *on_cpu)
        answer = results[name] = machine.ask(RUN_DEADLINE_S, "run", *model, *arguments)
        error = answer.get("error") or expected.get("error")
        if error:
            report.check(f"small run, {name}", False, error)
            continue
        losses, kept = difference(answer["losses"], expected["losses"]), overlap(answer["masks"], expected["masks"])
        report.check(
            f"small run, {name}",
            losses <= bound and kept >= least_overlap,
            f"losses within {losses:.1e} of the CPU's, {kept:.1%} of kept groups the same",
        )


def whole_prune(machine, report, device, results):
    """`espalier prune` with a coordinator and two workers that share the device."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [
            HERE / "bin/espalier", "prune", "--model", HERE / "model", "--data", HERE / "text/tiny.txt",
            "--eval-data", HERE / "text/held_out.txt", "--out", out, "--workers", "2", "--threads", machine.threads,
            "--device", device, "--sparsity", "0.3", "--steps", "20", "--window-tokens", "32", "--rows", "2",
            "--eval-window", "32", "--eval-max-tokens", "2000",
        ]
        if device != "cpu":
            command += ["--compute", "bf16", "--storage", "bf16"]
        started = time.monotonic()
        status, _, problems = machine.run(PRUNE_DEADLINE_S, *command)
        seconds = time.monotonic() - started
        written = status == 0 and any(out.rglob("*.safetensors"))
        results["prune"] = {"seconds": seconds, "status": status, "problems": problems[-2000:]}
        found = f"{seconds:.1f} s" if written else problems.strip()[-300:]
        report.check("espalier prune, 2 workers on the device", written, found)


def steps(machine, report, given, results):
    """Rates, memory and the ramp at the shapes of `--shape`."""
    shape = ["--random", given.shape, "--device", given.device, "--peak-tflop-per-s", str(given.peak_tflop_per_s)]
    on_gpu = given.device != "cpu"
    compute = ["--compute", "bf16"] if on_gpu else []
    plain = ["bf16"] if on_gpu else ["f32"]
    for storage in [*plain, "int8", "nf4"]:
        kind = [*shape, *compute, "--storage", storage]
        long = [*kind, "--rows", "1", "--window", str(given.window), "--micro", str(given.micro), "--ramp", str(given.ramp)]
        answer = results[f"step {storage}"] = machine.ask(STEP_DEADLINE_S, "step", *long)
        if "error" in answer:
            report.check(f"step, {storage} base", False, answer["error"])
            continue
        finite = answer["loss"] == answer["loss"] and answer["tokens_per_s"] > 0
        report.check(f"step, {storage} base", finite, f"loss {answer['loss']:.3f}, {answer['step_s']:.3f} s")
        at_7b = on_gpu and given.shape == LLAMA_7B
        report.measured(
            f"  rate, {storage}",
            f"{answer['tokens_per_s']:.0f} tokens/s, {answer['tflop_per_s']:.4g} TFLOP/s, MFU {answer['mfu']:.1%}",
            answer["mfu"] >= MFU_GOAL if at_7b and storage == "bf16" else None,
        )
        report.measured(
            f"  scores, {storage}",
            f"{answer['score_s'] * 1e3:.1f} ms, {answer['score_share']:.1%} of the step",
            answer["score_share"] <= SCORE_SHARE_GOAL if at_7b else None,
        )
        report.measured(f"  peak at {given.window} tokens, {storage}", f"{answer['peak_bytes'] / 1e9:.2f} GB")
        for point in answer["ramp"]:
            report.measured(
                f"  {point['kept_parameters']:.0%} kept, {storage}",
                f"{point['step_s']:.3f} s a step ({answer['step_s'] / point['step_s']:.2f}x), "
                f"{point['allocated_bytes'] / 1e9:.2f} GB held, mask applied in {point['apply_s']:.2f} s",
            )
        short = [*kind, "--rows", "1", "--window", str(min(512, given.window))]
        answer = results[f"memory {storage}"] = machine.ask(STEP_DEADLINE_S, "step", *short)
        if "error" in answer:
            report.check(f"one window of 512, {storage}", False, answer["error"])
            continue
        goal = PEAK_GOALS.get(storage) if at_7b else None
        report.measured(
            f"  peak at 1 x {min(512, given.window)}, {storage}",
            f"{answer['peak_bytes'] / 1e9:.2f} GB",
            None if goal is None else answer["peak_bytes"] <= goal,
        )


def reference(report, given, results):
    """PyTorch + transformers + peft, where they are installed."""
    for storage in ["bf16", "int8"] if given.device != "cpu" else ["f32"]:
        command = [
            sys.executable, HERE / "reference.py", "--shape", given.shape, "--device", given.device, "--storage", storage,
            "--window", given.window, "--micro", given.micro, "--peak-tflop-per-s", given.peak_tflop_per_s,
        ]
        try:
            done = subprocess.run(
                [str(word) for word in command],
                capture_output=True,
                text=True,
                timeout=STEP_DEADLINE_S,
                check=False,
            )
            lines = done.stdout.strip().splitlines()
            answer = json.loads(lines[-1]) if done.returncode == 0 and lines else {"error": done.stderr.strip()[-300:]}
        except subprocess.TimeoutExpired:
            answer = {"error": f"no end within {STEP_DEADLINE_S} s"}
        results[f"reference {storage}"] = answer
        if "error" in answer:
            report.measured(f"PyTorch + peft, {storage}", f"not measured: {answer['error'].splitlines()[-1][:120]}")
            continue
        found = f"{answer['tokens_per_s']:.0f} tokens/s, MFU {answer['mfu']:.1%}, peak {answer['peak_bytes'] / 1e9:.2f} GB"
        ours = results.get(f"step {storage}", {})
        if "tokens_per_s" in ours:
            found += f"; ours {ours['tokens_per_s'] / answer['tokens_per_s']:.2f}x"
        report.measured(f"PyTorch + peft, {storage}", found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0", help="cuda:N; `cpu` to try the script itself")
    parser.add_argument("--libtorch", help="`lib` folder of torch 2.11 [default: that of this Python]")
    parser.add_argument("--shape", default=LLAMA_7B, help="hidden,layers,heads,kv_heads,ffn,vocabulary")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--micro", type=int, default=8, help="windows in a step")
    parser.add_argument("--ramp", type=int, default=3, help="decisions on the way to half of the groups")
    parser.add_argument("--threads", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--peak-tflop-per-s", type=float, default=H200_TFLOP_PER_S)
    parser.add_argument("--no-reference", action="store_true", help="do not measure PyTorch + peft")
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    given = parser.parse_args()
    machine, report, results = Machine(library_folders(given.libtorch), given.threads), Report(), {}
    probe = results["probe"] = machine.ask(PROBE_DEADLINE_S, "probe", "--device", given.device)
    report.check("the device answers", "error" not in probe, probe.get("error") or json.dumps(probe))
    if "error" not in probe:
        if given.device != "cpu":
            report.check("kernels compile and load", probe["kernels"], str(probe["kernels"]))
            report.check("one rank of NCCL", probe["nccl"]["works"], json.dumps(probe["nccl"]))
        parity(machine, report, given.device, results)
        whole_prune(machine, report, given.device, results)
        steps(machine, report, given, results)
        if not given.no_reference:
            reference(report, given, results)
    print(report.table())
    given.out.write_text(json.dumps({"rows": report.rows, "results": results}, indent=1) + "\n")
    print(f"written to {given.out}")
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    main()
