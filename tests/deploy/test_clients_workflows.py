"""The example for Argo Workflows: the very commands of its containers, one after the other, against a real coordinator and worker
with TLS and tokens."""

import graphlib
import json
import os
import re
import subprocess

import pytest
import yaml
from conftest import REPOSITORY
from deployment import HELD_OUT, MODEL, TEXT, secure_deployment

WORKFLOW = REPOSITORY / "deploy" / "workflows" / "argo.yaml"
STEP_S = 180


class StepFailed(Exception):
    pass


class Argo:
    """As much of a controller as the example needs: parameters, dependencies, files, and what a step printed."""

    def __init__(self, spec, parameters, folder, secrets):
        given = {each["name"]: each.get("value") for each in spec["arguments"]["parameters"]} | parameters
        missing = [name for name, value in given.items() if value is None]
        assert not missing, missing
        self.known = {f"workflow.parameters.{name}": value for name, value in given.items()}
        self.known |= {"workflow.name": "espalier-prune-x7k2p", "workflow.uid": "5f0f3c0e-9c1b-4d5e-8a51-1f0c6e5b8a77"}
        self.templates = {each["name"]: each for each in spec["templates"]}
        self.entry = self.templates[spec["entrypoint"]]
        self.folder = folder
        self.volumes = {each["name"]: secrets[each["secret"]["secretName"]] for each in spec["volumes"]}

    def filled(self, text, more=None):
        known = self.known | (more or {})

        def value(found):
            if run := re.fullmatch(r"=jsonpath\(([\w.-]+), '\$\.run\.id'\)", found[1]):
                return json.loads(known[run[1]])["run"]["id"]
            return str(known[found[1]])

        return re.sub(r"\{\{(.+?)\}\}", value, text)

    def run(self):
        tasks = {each["name"]: each for each in self.entry["dag"]["tasks"]}
        graph = {name: set(task.get("depends", "").split()) for name, task in tasks.items()}
        for name in graphlib.TopologicalSorter(graph).static_order():
            self.task(tasks[name])

    def task(self, task):
        arguments = task.get("arguments", {}).get("parameters", [])
        inputs = {f"inputs.parameters.{each['name']}": self.filled(each["value"]) for each in arguments}
        template = self.templates[task["template"]]
        container = template["container"]
        # Where a container would see its files, and where they lie here.
        places = {mount["mountPath"]: str(self.volumes[mount["name"]]) for mount in container["volumeMounts"]}
        for artifact in template.get("inputs", {}).get("artifacts", []):
            file = self.folder / artifact["name"]
            file.write_text(self.filled(artifact["raw"]["data"], inputs))
            places[artifact["path"]] = str(file)

        def here(text):
            text = self.filled(text, inputs)
            for there, place in places.items():
                if text == there or text.startswith(f"{there}/"):
                    return place + text.removeprefix(there)
            return text

        assert container["command"] == ["espalier"]
        done = subprocess.run(
            [REPOSITORY / "target" / "debug" / "espalier", *map(here, container["args"])],
            env={"PATH": os.environ["PATH"], **{each["name"]: here(each["value"]) for each in container["env"]}},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=STEP_S,
            check=False,
        )
        if done.returncode != 0:
            raise StepFailed(f"{task['name']} ended with {done.returncode}: {done.stderr}")
        self.known[f"tasks.{task['name']}.outputs.result"] = done.stdout


@pytest.fixture
def argo(secure_deployment, tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "ca.crt").write_bytes(secure_deployment.ca.read_bytes())
    (secret / "token").write_text(secure_deployment.tokens["operate"])
    spec = yaml.safe_load(WORKFLOW.read_text())["spec"]

    def controller(**parameters):
        parameters = {
            "coordinator": secure_deployment.url,
            "model": str(MODEL),
            "data": str(TEXT),
            "held-out": str(HELD_OUT),
            "workers": "1",
            "steps": "20",
        } | parameters
        return Argo(spec, parameters, tmp_path, {"espalier-client": secret})

    return controller


def test_argo_prunes_measures_and_exports_and_a_step_may_be_tried_again(argo, secure_deployment):
    workflow = argo(out=str(secure_deployment.folder / "half"))
    workflow.run()
    assert (secure_deployment.folder / "half" / "config.json").is_file()
    assert (secure_deployment.folder / "half-bf16" / "config.json").is_file()
    assert json.loads(workflow.known["tasks.evaluate.outputs.result"])["evaluation"]["perplexity"] > 1
    created = json.loads(workflow.known["tasks.create.outputs.result"])["run"]["id"]
    # As after a lost pod: the same run.
    create, wait = workflow.entry["dag"]["tasks"][:2]
    workflow.task(create)
    workflow.task(wait)
    assert json.loads(workflow.known["tasks.create.outputs.result"])["run"]["id"] == created


def test_argo_fails_at_the_step_where_something_is_wrong(argo, secure_deployment):
    with pytest.raises(StepFailed, match=r"(?s)create ended with 2: .*sparsity"):
        argo(out=str(secure_deployment.folder / "wrong"), sparsity="1.5").run()
