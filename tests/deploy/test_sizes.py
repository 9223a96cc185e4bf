"""The chart's values files for models of known size, and docs/kubernetes.md: what they ask for is enough by `espalier plan`."""

import json
import re

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
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40},
    "65b": {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 64},
}
FILES = sorted((CHART / "values").glob("*.yaml"))
DOCUMENT = (REPOSITORY / "docs" / "kubernetes.md").read_text()


def documented_yaml(name):
    (found,) = re.findall(rf"^```yaml\n# {re.escape(name)}\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)
    return found


def plan(tmp_path, model, workers, *more):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA | MODELS[model]))
    recipe = tmp_path / "run.yaml"
    recipe.write_text(documented_yaml("run.yaml"))
    binary = REPOSITORY / "target" / "debug" / "espalier"
    assert binary.is_file(), f"{binary} is missing; `make test-service` builds it"
    return run(binary, "plan", "--config", config, "--recipe", recipe, "--workers", workers, "--device", "h100", *more)


def gib(stage):
    return sum(stage.values()) / GIB


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
    planned = plan(tmp_path, path.stem.split("-")[1], count, "--json")
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
    planned = plan(tmp_path, "65b", 1)
    assert planned.returncode == 2 and "GiB" in planned.stderr, planned.stderr


def test_the_documented_sizes_are_what_the_planner_says(tmp_path):
    rows = re.findall(r"^\| LLaMA (\d+B) \| ([0-9 x]+) \|.*$", DOCUMENT, re.MULTILINE)
    assert rows == [("7B", "1"), ("13B", "4"), ("65B", "8"), ("65B", "2 x 8")]
    for model, workers in rows:
        count = 16 if workers == "2 x 8" else int(workers)
        planned = plan(tmp_path, model.lower(), count, "--json")
        assert planned.returncode == 0, planned.stderr
        estimate = json.loads(planned.stdout)["estimate"]
        stages = dict(estimate["stages"])
        memory = ", ".join(f"{gib(stages[name]):.1f}" for name in ("first_step", "decision", "last_step"))
        minutes = sum(estimate["run"][name] for name in ("steps", "decisions", "teaching")) / 60
        checkpoint = estimate["checkpoint"]
        figures = f"| {memory} | {minutes:.0f} min | {checkpoint['rank'] / 1e9:.1f} GB, {checkpoint['total'] / 1e9:.1f} GB |"
        (row,) = re.findall(rf"^\| LLaMA {model} \| {workers} \|.*$", DOCUMENT, re.MULTILINE)
        assert row.endswith(figures), f"should end with {figures}: {row}"


def test_the_documented_plan_is_what_the_planner_prints(tmp_path):
    (documented,) = re.findall(r"espalier plan --config.*?^```text\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)
    planned = plan(tmp_path, "13b", 4)
    assert planned.stdout.startswith(documented), planned.stdout


def test_the_documented_job_that_fills_volumes_is_valid_and_restricted():
    objects = list(yaml.safe_load_all(documented_yaml("fill.yaml")))
    assert [each["kind"] for each in objects] == ["PersistentVolumeClaim", "PersistentVolumeClaim", "Job"]
    validate(objects, "1.30")
    pod = objects[-1]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    # What the run reads is where the job puts it.
    spec = yaml.safe_load(documented_yaml("run.yaml"))
    mounts = [each["mountPath"] for each in container["volumeMounts"]]
    for path in [spec["model"], *(each["path"] for each in spec["data"]), *(each["path"] for each in spec["evaluation"]["data"])]:
        assert path.startswith(tuple(f"{mount}/" for mount in mounts)), path
        assert path.split("/")[2] in container["args"][0], path
