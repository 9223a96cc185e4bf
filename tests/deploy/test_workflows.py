"""The example for Argo Workflows, its very scripts, one after the other, against a real coordinator and worker."""

import graphlib
import re
import subprocess
import sys

import pytest
import yaml
from conftest import REPOSITORY
from test_client import FIXTURES, Deployment, package  # noqa: F401

WORKFLOW = REPOSITORY / "deploy" / "workflows" / "argo.yaml"
STEP_S = 180


class Argo:
    """As much of a controller as the example needs: parameters, dependencies, outputs from files."""

    def __init__(self, spec, parameters, folder, packages):
        self.folder, self.packages = folder, packages
        given = {each["name"]: each.get("value") for each in spec["arguments"]["parameters"]} | parameters
        missing = [name for name, value in given.items() if value is None]
        assert not missing, missing
        self.known = {f"workflow.parameters.{name}": value for name, value in given.items()}
        self.known |= {"workflow.name": "espalier-prune-x7k2p", "workflow.uid": "5f0f3c0e-uid"}
        self.templates = {each["name"]: each for each in spec["templates"]}
        self.entry = self.templates[spec["entrypoint"]]

    def filled(self, text, more):
        known = self.known | more
        return re.sub(r"\{\{([\w.-]+)\}\}", lambda found: str(known[found[1]]), text)

    def run(self):
        tasks = {each["name"]: each for each in self.entry["dag"]["tasks"]}
        graph = {name: set(task.get("depends", "").split()) for name, task in tasks.items()}
        for name in graphlib.TopologicalSorter(graph).static_order():
            task = tasks[name]
            arguments = task.get("arguments", {}).get("parameters", [])
            inputs = {f"inputs.parameters.{each['name']}": self.filled(each["value"], {}) for each in arguments}
            self.step(name, self.templates[task["template"]], inputs)

    def step(self, name, template, inputs):
        assert template["script"]["command"] == ["python"]
        # What a container has to itself.
        source = self.filled(template["script"]["source"].replace("/tmp/", f"{self.folder}/"), inputs)
        done = subprocess.run(
            [sys.executable, "-c", source],
            env={"PYTHONPATH": str(self.packages)},
            capture_output=True,
            text=True,
            timeout=STEP_S,
            check=False,
        )
        assert done.returncode == 0, f"{name}: {done.stderr}"
        for output in template.get("outputs", {}).get("parameters", []):
            path = self.folder / output["valueFrom"]["path"].removeprefix("/tmp/")
            self.known[f"tasks.{name}.outputs.parameters.{output['name']}"] = path.read_text()


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    deployment = Deployment(tmp_path_factory.mktemp("workflows"))
    try:
        deployment.start_coordinator()
        deployment.start_worker()
        yield deployment
    finally:
        deployment.stop()


def test_the_workflow_prunes_measures_and_exports_and_may_be_tried_again(package, deployment, tmp_path):  # noqa: F811
    spec = yaml.safe_load(WORKFLOW.read_text())["spec"]
    parameters = {
        "coordinator": deployment.address,
        "model": str(FIXTURES / "models" / "gqa"),
        "data": str(FIXTURES / "text" / "tiny.txt"),
        "heldOut": str(FIXTURES / "text" / "held_out.txt"),
        "out": str(deployment.folder / "half"),
        "workers": "1",
        "steps": "20",
    }
    argo = Argo(spec, parameters, tmp_path, package)
    argo.run()
    assert (deployment.folder / "half" / "config.json").is_file()
    assert (deployment.folder / "half-f16" / "config.json").is_file()
    assert float(argo.known["tasks.evaluate.outputs.parameters.perplexity"]) > 1
    run_id = argo.known["tasks.create.outputs.parameters.run"]
    # A step that is tried again, as after a lost pod, finds the same run.
    argo.step("create", argo.templates["create"], {})
    assert argo.known["tasks.create.outputs.parameters.run"] == run_id
