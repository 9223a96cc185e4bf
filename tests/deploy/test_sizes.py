"""The chart's values files for models of known size: they render, and what they ask for is enough by `espalier plan`."""

import json

import pytest
import yaml
from chart_objects import option, template, the_container, worker_sets
from chart_values import PLAIN
from conftest import CHART, REPOSITORY, run
from test_chart import validate

GIB = 2**30
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
MODELS = {
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40},
    "65b": {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 64},
}
FILES = sorted((CHART / "values").glob("*.yaml"))


def test_there_is_a_file_for_each_size_that_is_documented():
    assert [path.stem for path in FILES] == ["llama-13b-4-gpus", "llama-65b-2x8-gpus", "llama-65b-8-gpus"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_the_pool_asks_for_is_enough(path, render, tmp_path):
    values = yaml.safe_load(path.read_text())
    objects = render({**PLAIN, **values})
    validate(objects, "1.30")
    (workers,) = worker_sets(objects)
    if workers["kind"] == "LeaderWorkerSet":
        count = workers["spec"]["leaderWorkerTemplate"]["size"]
    else:
        count = workers["spec"]["replicas"]
    container = the_container(template(workers)["spec"])
    assert option(container, "--device") == ["cuda"]
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA | MODELS[path.stem.split("-")[1]]))
    binary = REPOSITORY / "target" / "debug" / "espalier"
    planned = run(binary, "plan", "--config", config, "--workers", count, "--device", "h100", "--json")
    assert planned.returncode == 0, planned.stderr
    estimate = json.loads(planned.stdout)["estimate"]
    assert estimate["largest_degree"] % count == 0 or count <= estimate["largest_degree"]
    # A checkpoint of one worker passes through /tmp where an object store is used, and shards lie in the volume.
    volume = values["volumes"]["out"]["size"]
    assert volume.endswith("Gi")
    # Two checkpoints kept, one of each decision, and the exported model.
    exported = 2 * estimate["pruned_parameters"]
    assert int(volume.removesuffix("Gi")) * GIB > 12 * estimate["checkpoint"]["total"] + exported
    # The dense model in bf16.
    assert int(values["volumes"]["models"]["size"].removesuffix("Gi")) * GIB > 2 * estimate["dense_parameters"]


def test_a_plan_that_does_not_fit_is_refused(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA | MODELS["65b"]))
    binary = REPOSITORY / "target" / "debug" / "espalier"
    planned = run(binary, "plan", "--config", config, "--workers", "1", "--device", "h100")
    assert planned.returncode == 2 and "GiB" in planned.stderr, planned.stderr
