"""Pruned models as stock `transformers` sees them."""

import hashlib

import pytest
import torch
from conftest import Case, head_dim_of, load_in_transformers, read_config, read_tensors
from transformers import AutoConfig, AutoTokenizer

LOGIT_TOLERANCE = 1e-4
PROMPT = "In spring the gardener ties"

CASES = [
    Case("mha"),
    # Three heads do not divide 32: no legal `llama`.
    Case("mha", sparsity=0.25),
    Case("gqa"),
    Case("gqa", compensation="layer"),
    Case("gqa", knots="5"),
    Case("gqa", head_grouping="query-heads"),
    Case("gqa", shape="paper"),
    Case("gqa", shape="global"),
    Case("tied"),
    Case("llama3_rope"),
    Case("mistral_headdim"),
    Case("bf16_sharded"),
    Case("bf16_sharded", export_dtype="bf16"),
]

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
COLUMN_GROUPED = ("o_proj", "down_proj")


@pytest.fixture(params=CASES, ids=lambda case: case.id)
def export(request, export_of):
    return export_of(request.param)


def projection_name(layer, projection):
    return f"model.layers.{layer}.{'self_attn' if projection in ATTENTION else 'mlp'}.{projection}.weight"


def test_transformers_loads_it_and_gets_our_logits(espalier, export, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(export.folder)
    tokens = tokenizer(PROMPT)["input_ids"]
    model = load_in_transformers(export.folder)
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([tokens])).logits[0]
    ours = espalier.logits(export.folder, tokens, tmp_path / "logits.safetensors")
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() <= LOGIT_TOLERANCE


def test_transformers_generates_text_with_it(export):
    tokenizer = AutoTokenizer.from_pretrained(export.folder)
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    model = load_in_transformers(export.folder)
    attention_mask = torch.ones_like(prompt)
    tokens = model.generate(
        prompt, attention_mask=attention_mask, max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0
    )[0]
    assert len(tokens) == prompt.shape[1] + 20
    text = tokenizer.decode(tokens)
    assert text.startswith(PROMPT) and len(text) == len(PROMPT) + 20
    # With its cache it chooses what one pass over the whole text would have chosen.
    with torch.no_grad():
        logits = model(input_ids=tokens[None]).logits[0, prompt.shape[1] - 1 : -1]
    chosen = logits.gather(1, tokens[prompt.shape[1] :, None])[:, 0]
    assert (logits.amax(1) - chosen).max() <= LOGIT_TOLERANCE


def test_the_tokenizer_came_along(export):
    source, copy = (AutoTokenizer.from_pretrained(folder) for folder in (export.source_folder, export.folder))
    text = "Every tree, 12 buds (and one é)\n~"
    assert copy(text)["input_ids"] == source(text)["input_ids"]


def test_the_config_is_legal_and_says_what_the_source_said(export):
    config, source = read_config(export.folder), read_config(export.source_folder)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    assert heads % kv_heads == 0
    # A llama's hidden size must be a multiple of its heads; otherwise only the mistral form loads.
    if source["model_type"] == "llama" and config["hidden_size"] % heads == 0:
        assert config["model_type"] == "llama"
    else:
        assert config["model_type"] == "mistral"
        assert config["sliding_window"] is None
    assert config["architectures"] == [{"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}[config["model_type"]]]
    assert config["head_dim"] == head_dim_of(source)
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings", "rms_norm_eps", "hidden_act",
                "tie_word_embeddings", "bos_token_id", "eos_token_id"):  # fmt: skip
        assert config[key] == source[key], key
    loaded, dense = (AutoConfig.from_pretrained(folder) for folder in (export.folder, export.source_folder))
    assert loaded.rope_parameters == dense.rope_parameters
    expected = torch.bfloat16 if export.case.export_dtype == "bf16" else torch.float32
    assert loaded.dtype == expected
    assert all(tensor.dtype == expected for tensor in read_tensors(export.folder).values())


def test_a_head_count_that_llama_refuses_is_written_as_mistral(export_of):
    config = read_config(export_of(Case("mha", sparsity=0.25)).folder)
    assert (config["num_attention_heads"], config["model_type"]) == (3, "mistral")


def test_parameters_are_as_many_as_the_config_says(export):
    config, tensors = read_config(export.folder), read_tensors(export.folder)
    hidden, channels = config["hidden_size"], config["intermediate_size"]
    query, key = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    embeddings = (1 if config["tie_word_embeddings"] else 2) * config["vocab_size"] * hidden
    layer = 2 * hidden * query + 2 * hidden * key + 3 * hidden * channels + 2 * hidden
    expected = embeddings + hidden + config["num_hidden_layers"] * layer
    assert sum(tensor.numel() for tensor in tensors.values()) == expected
    assert load_in_transformers(export.folder).num_parameters() == expected
    assert ("lm_head.weight" in tensors) == (not config["tie_word_embeddings"])


def test_the_manifest_counts_and_digests_what_is_there(export):
    manifest, written = export.manifest(), read_tensors(export.folder)
    source = read_tensors(export.source_folder)
    assert manifest["source_model"]["name"] == export.case.model
    assert manifest["parameters_before"] == sum(tensor.numel() for tensor in source.values())
    # Zeros that pad unequal layers to the widest are counted: they are in the files.
    assert manifest["parameters_after"] == sum(tensor.numel() for tensor in written.values())
    listed = {file["name"]: file for file in manifest["files"]}
    assert sorted([*listed, "espalier_manifest.json"]) == sorted(file.name for file in export.folder.iterdir())
    for folder, files in ((export.folder, manifest["files"]), (export.source_folder, manifest["source_model"]["files"])):
        assert any(file["name"].endswith(".safetensors") for file in files)
        for file in files:
            content = (folder / file["name"]).read_bytes()
            assert len(content) == file["size_bytes"]
            assert hashlib.sha256(content).hexdigest() == file["sha256"]


def test_the_share_removed_is_the_one_asked_for(export):
    """Short of the target by less than the coarsest unit that could still have gone."""
    config, source = read_config(export.source_folder), export.case
    head_dim, hidden = head_dim_of(config), config["hidden_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dense = config["num_hidden_layers"] * hidden * (2 * head_dim * (heads + kv_heads) + 3 * config["intermediate_size"])
    kept = sum(
        hidden * (2 * head_dim * (len(queries) + len(keys)) + 3 * len(channels)) for queries, keys, channels in export.kept()
    )
    group = 2 * hidden * head_dim * (heads // kv_heads + 1)
    # Shape `paper` leaves its last layer whole.
    layers = config["num_hidden_layers"]
    target = source.sparsity * ((layers - 1) / layers if source.shape == "paper" else 1)
    units = 1 if source.shape == "global" else layers
    assert abs((1 - kept / dense) - target) * dense <= units * (group + 3 * hidden)


def test_kept_indices_ascend_and_lie_in_the_source(export):
    config = read_config(export.source_folder)
    heads_per_kv_head = config["num_attention_heads"] // config["num_key_value_heads"]
    kept = export.kept()
    assert len(kept) == config["num_hidden_layers"]
    for query_heads, kv_heads, channels in kept:
        for indices, count in (
            (query_heads, config["num_attention_heads"]),
            (kv_heads, config["num_key_value_heads"]),
            (channels, config["intermediate_size"]),
        ):
            assert indices == sorted(set(indices)) and indices and 0 <= indices[0] and indices[-1] < count
        owners = [head // heads_per_kv_head for head in query_heads]
        assert sorted(set(owners)) == kv_heads
        assert len({owners.count(kv_head) for kv_head in kv_heads}) == 1
        if export.case.head_grouping == "query-heads":
            assert len(kv_heads) == config["num_key_value_heads"]
    if export.case.shape == "uniform":
        assert len({tuple(len(indices) for indices in layer) for layer in kept}) == 1


def test_every_projection_is_the_kept_part_of_the_source_plus_a_correction_of_lora_rank(export):
    """Whatever was learned, `W - W0[kept]` has at most the rank of the LoRA factors; any wrong index would fill it up, and so
    does what compensation changes of o and down."""
    source, pruned = read_tensors(export.source_folder), read_tensors(export.folder)
    head_dim = head_dim_of(read_config(export.source_folder))
    tolerance = 2e-2 if export.case.export_dtype == "bf16" else 1e-5
    tuned = 0
    for layer, (query_heads, kv_heads, channels) in enumerate(export.kept()):
        for projection in ATTENTION + MLP:
            if projection in MLP:
                elements = channels
            else:
                groups = query_heads if projection in ("q_proj", "o_proj") else kv_heads
                elements = [head * head_dim + offset for head in groups for offset in range(head_dim)]
            name = projection_name(layer, projection)
            dense, written = source[name].double(), pruned[name].double()
            if projection in COLUMN_GROUPED:
                dense, written = dense.T, written.T
            kept, padding = written[: len(elements)], written[len(elements) :]
            assert not padding.any(), f"{name}: padding must be zero"
            assert len(kept) == len(elements), name
            singular_values = torch.linalg.svdvals(kept - dense[elements])
            scale = torch.linalg.matrix_norm(dense[elements])
            rank = export.case.update_rank
            assert min(kept.shape) > rank
            refitted = export.case.compensation != "none" and projection in COLUMN_GROUPED
            assert (singular_values[rank:].norm() <= tolerance * scale) != refitted, name
            tuned += bool(singular_values[0] > 1e-4 * scale)
    assert tuned > 0, "nothing was learned"


def test_all_other_tensors_are_the_source_s(export):
    source, pruned = read_tensors(export.source_folder), read_tensors(export.folder)
    assert sorted(pruned) == sorted(source)
    for name in source:
        if "_proj." not in name:
            assert torch.equal(pruned[name].float(), source[name].float()), name
