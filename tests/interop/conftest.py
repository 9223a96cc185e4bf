"""Runs the built `espalier` and reads what it wrote. All knowledge of its command line and of its manifest is in this file."""

import contextlib
import json
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

REPOSITORY = Path(__file__).resolve().parents[2]
FIXTURES = REPOSITORY / "tests" / "fixtures"
MODELS = FIXTURES / "models"
GOLDENS = FIXTURES / "goldens"
TRAINING_TEXT = FIXTURES / "text" / "tiny.txt"
TASKS = sorted((FIXTURES / "tasks").glob("*.jsonl"))

PRUNE_TIMEOUT_SECONDS = 300
LOGITS_TIMEOUT_SECONDS = 60
EVAL_TIMEOUT_SECONDS = 120
LORA_RANK = 4

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)


# The command line --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One `espalier prune`."""

    model: str
    sparsity: float = 0.5
    head_grouping: str = "kv-groups"
    shape: str = "uniform"
    export_dtype: str = "f32"
    compensation: str = "none"
    knots: str = ""

    @property
    def update_rank(self):
        """Highest rank of what tuning may add to a matrix."""
        return LORA_RANK * (1 + len([knot for knot in self.knots.split(",") if knot]))

    @property
    def id(self):
        parts = (self.model, self.sparsity, self.head_grouping, self.shape, self.export_dtype, self.compensation)
        parts = (*parts, self.knots) if self.knots else parts
        return "-".join(str(part) for part in parts)

    def arguments(self, out):
        return [
            "prune",
            "--model", MODELS / self.model,
            "--data", TRAINING_TEXT,
            "--out", out,
            "--workers", 2,
            "--sparsity", self.sparsity,
            "--shape", self.shape,
            "--head-grouping", self.head_grouping,
            "--steps", 20,
            "--window-tokens", 32,
            "--rows", 2,
            "--micro-batches", 1,
            "--lora-rank", LORA_RANK,
            "--export-dtype", self.export_dtype,
            "--compensation", self.compensation,
            *(["--knots", self.knots] if self.knots else []),
        ]  # fmt: skip


class Espalier:
    """The built command."""

    def __init__(self, binary):
        self.binary = binary

    def run(self, arguments, timeout_seconds):
        """Standard output of a run that must succeed and must leave no process of its group behind."""
        command = [str(part) for part in (self.binary, *arguments)]
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            stdout, stderr = process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            stdout, stderr = process.communicate()
            pytest.fail(f"not done after {timeout_seconds} s: {' '.join(command)}\n{stdout[-2000:]}\n{stderr[-4000:]}")
        if process.returncode != 0:
            pytest.fail(f"exit {process.returncode}: {' '.join(command)}\n{stdout[-2000:]}\n{stderr[-4000:]}")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"processes were left running by: {' '.join(command)}")
        return stdout

    def logits(self, model, tokens, out):
        """Our logits [tokens, vocab] of one row of token ids."""
        joined = ",".join(str(token) for token in tokens)
        self.run(["logits", "--model", model, "--tokens", joined, "--out", out], LOGITS_TIMEOUT_SECONDS)
        written = load_file(out)
        assert written["input_ids"].tolist() == [list(tokens)]
        return written["logits"][0]


    def tasks(self, model, files, workers=1, pass_tokens=2048, limit=0):
        """Results of `eval --tasks`, one for each file, with each choice's log-likelihood."""
        arguments = ["eval", "--model", model, "--tasks", *files, "--workers", workers, "--threads", 1]
        arguments += ["--pass-tokens", pass_tokens, "--task-limit", limit, "--json", "--log-likelihoods"]
        return json.loads(self.run(arguments, EVAL_TIMEOUT_SECONDS))["tasks"]


def find_binary():
    if chosen := os.environ.get("ESPALIER_BIN"):
        if not Path(chosen).is_file():
            pytest.fail(f"ESPALIER_BIN is {chosen}, which is no file")
        return Path(chosen).resolve()
    built = [REPOSITORY / "target" / profile / "espalier" for profile in ("debug", "release")]
    built = [binary for binary in built if binary.is_file()]
    if not built:
        pytest.fail("neither target/debug/espalier nor target/release/espalier exists: build first, or set ESPALIER_BIN")
    return max(built, key=lambda binary: binary.stat().st_mtime)


@pytest.fixture(scope="session")
def espalier():
    return Espalier(find_binary())


# What was written --------------------------------------------------------------------------------------------------------


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def read_tensors(folder):
    """All tensors of a folder; a name in two files is an error."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            assert name not in tensors, f"{name} is in two files of {folder}"
            tensors[name] = tensor
    return tensors


def head_dim_of(config):
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


@dataclass
class Export:
    """A pruned model and the one that it was made from."""

    case: Case
    folder: Path

    @property
    def source_folder(self):
        return MODELS / self.case.model

    def manifest(self):
        return json.loads((self.folder / "espalier_manifest.json").read_text())

    def kept(self):
        """By layer: old indices of query heads, kv heads and channels, in the order of the new ones."""
        return [
            (layer["kept_query_heads"], layer["kept_kv_heads"], layer["kept_channels"])
            for layer in self.manifest()["layers"]
        ]


@pytest.fixture(scope="session")
def export_of(espalier, tmp_path_factory):
    """Prunes once for each case, however many tests ask."""
    done = {}

    def prune(case):
        if case not in done:
            done[case] = None
            out = tmp_path_factory.mktemp("pruned")
            stdout = espalier.run(case.arguments(out), PRUNE_TIMEOUT_SECONDS)
            folder = out / "model"
            assert (folder / "config.json").is_file(), f"no model at {folder} after a run that said:\n{stdout}"
            done[case] = Export(case, folder)
        if done[case] is None:
            pytest.fail(f"pruning has failed already for {case.id}")
        return done[case]

    return prune


def load_in_transformers(folder):
    """Stock classes, no remote code, f32; every tensor must find its place."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False, output_loading_info=True
    )
    for kind, names in report.items():
        assert not names, f"{kind}: {names}"
    return model.eval()
