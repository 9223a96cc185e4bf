"""Models without some of their blocks, as stock `transformers` sees them."""

from dataclasses import dataclass

import pytest
import torch
from conftest import LORA_RANK, MODELS, TRAINING_TEXT, Case, load_in_transformers, read_config, read_tensors
from transformers import AutoTokenizer

PROMPT = "In spring the gardener ties"


@dataclass(frozen=True)
class DepthCase(Case):
    """One `espalier prune` from which whole blocks go."""

    criterion: str = "perplexity"
    blocks: int | None = None
    iterative: bool = False

    @property
    def id(self):
        return f"{super().id}-{self.criterion}-{self.blocks}-{self.iterative}"

    def arguments(self, out):
        words = [*super().arguments(out), "--depth", self.criterion, "--protect-ends", "false"]
        words += ["--iterative", str(self.iterative).lower()]
        return words if self.blocks is None else [*words, "--blocks", self.blocks]


CASES = [
    DepthCase("gqa", sparsity=0.25),
    DepthCase("gqa", sparsity=0.5, iterative=True),
    DepthCase("mha", sparsity=0.5, criterion="taylor", blocks=1),
    DepthCase("tied", sparsity=0.7, criterion="magnitude", blocks=1, compensation="layer"),
]


@pytest.fixture(params=CASES, ids=lambda case: case.id)
def export(request, export_of):
    return export_of(request.param)


def test_the_config_counts_the_blocks_that_are_left_and_names_follow_one_another(export):
    config, source = read_config(export.folder), read_config(export.source_folder)
    kept = [bool(queries and channels) for queries, _, channels in export.kept()]
    assert len(kept) == source["num_hidden_layers"]
    gone = kept.count(False)
    wanted = export.case.blocks or round(export.case.sparsity * source["num_hidden_layers"])
    assert gone == wanted
    assert config["num_hidden_layers"] == source["num_hidden_layers"] - gone
    numbers = {int(name.split(".")[2]) for name in read_tensors(export.folder) if name.startswith("model.layers.")}
    assert numbers == set(range(config["num_hidden_layers"]))
    assert (config["intermediate_size"] == source["intermediate_size"]) == (export.case.blocks is None)


def test_each_block_is_the_one_that_it_was(export):
    """Norms, which nothing tunes, come from the blocks that stay, in order; nothing goes but blocks where the budget is theirs."""
    source, written = read_tensors(export.source_folder), read_tensors(export.folder)
    stay = [layer for layer, (queries, _, _) in enumerate(export.kept()) if queries]
    for place, layer in enumerate(stay):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            one, other = (tensors[f"model.layers.{at}.{norm}.weight"] for tensors, at in ((written, place), (source, layer)))
            assert torch.equal(one, other.to(one.dtype))
        if export.case.blocks is None:
            for projection in ("self_attn.q_proj", "mlp.down_proj"):
                before = source[f"model.layers.{layer}.{projection}.weight"].float()
                change = written[f"model.layers.{place}.{projection}.weight"].float() - before
                assert torch.linalg.matrix_rank(change, rtol=1e-3) <= LORA_RANK


def test_transformers_gets_our_logits_and_generates_with_its_cache(espalier, export, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(export.folder)
    tokens = tokenizer(PROMPT)["input_ids"]
    model = load_in_transformers(export.folder)
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([tokens])).logits[0]
    ours = espalier.logits(export.folder, tokens, tmp_path / "logits.safetensors")
    assert (ours - theirs).abs().max() <= 1e-4
    prompt = torch.tensor([tokens])
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    settings["attention_mask"] = torch.ones_like(prompt)
    with_cache, without = (model.generate(prompt, use_cache=use_cache, **settings)[0] for use_cache in (True, False))
    assert torch.equal(with_cache, without)
    assert MODELS.is_dir() and TRAINING_TEXT.is_file()
