"""Our forward pass on models as published: the same logits as `transformers`, live and as committed."""

import pytest
import torch
from conftest import GOLDENS, MODELS, load_in_transformers
from safetensors.torch import load_file

TOLERANCE = 1e-4


@pytest.mark.parametrize("model", sorted(file.stem for file in GOLDENS.glob("*.safetensors") if not file.stem.startswith("run_")))
def test_logits_of_a_dense_model_are_those_of_transformers(espalier, model, tmp_path):
    golden = load_file(GOLDENS / f"{model}.safetensors")
    theirs = load_in_transformers(MODELS / model)
    for row, tokens in enumerate(golden["input_ids"]):
        ours = espalier.logits(MODELS / model, tokens.tolist(), tmp_path / f"{row}.safetensors")
        with torch.no_grad():
            live = theirs(input_ids=tokens[None]).logits[0]
        assert ours.dtype == torch.float32
        assert ours.shape == live.shape
        assert (ours - live).abs().max() <= TOLERANCE
        assert (ours - golden["logits"][row]).abs().max() <= TOLERANCE


def test_logits_of_a_real_model_are_those_of_transformers(espalier, tmp_path):
    tokens = torch.tensor([1, *range(300, 420, 5)])
    ours = espalier.logits(MODELS / "stories260k", tokens.tolist(), tmp_path / "logits.safetensors")
    with torch.no_grad():
        live = load_in_transformers(MODELS / "stories260k")(input_ids=tokens[None]).logits[0]
    assert ours.shape == live.shape
    assert (ours - live).abs().max() <= TOLERANCE
