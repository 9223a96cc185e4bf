"""What the chart renders, judged by the rules of others: checkov's for Kubernetes, all but those below."""

import json
import subprocess

import pytest
import yaml
from chart_values import ACCEPTED, PLAIN
from conftest import CHART, REPOSITORY

CHECKOV = REPOSITORY / ".cache" / "checkov" / "bin" / "checkov"
# Rules that are not for the chart to keep, and why.
LEFT_OUT = {
    "CKV_K8S_21": "what is rendered bears no namespace: it is the release's, which `helm install --namespace` names",
    "CKV_K8S_43": "digests are given by image.*.digest; a chart cannot know those of a registry",
    "CKV_K8S_15": "image.pullPolicy is the installer's choice; tags of releases do not move",
}
# Of the pod of `helm test`, which asks once and ends.
LEFT_OUT_OF_THE_TEST = {"CKV_K8S_8", "CKV_K8S_9"}
VALUES = {"plain": PLAIN} | {name: PLAIN | ACCEPTED[name] for name in ("two pools", "telemetry to a collector")}
FILES = sorted((CHART / "values").glob("*.yaml"))


def failed(objects, folder):
    assert CHECKOV.is_file(), "checkov is not there: make test-service lays it out"
    path = folder / "rendered.yaml"
    path.write_text(yaml.safe_dump_all(objects))
    left_out = ("--skip-check", ",".join(LEFT_OUT))
    done = subprocess.run(
        [CHECKOV, "--framework", "kubernetes", "--skip-download", *left_out, "--output", "json", "--quiet", "--file", path],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=folder,
    )
    found = json.loads(done.stdout)
    assert found["summary"]["parsing_errors"] == 0, done.stdout
    checks = [(each["check_id"], each["resource"], each["check_name"]) for each in found["results"]["failed_checks"]]
    return found["summary"]["passed"], [each for each in checks if not (each[1].endswith("-test") and each[0] in LEFT_OUT_OF_THE_TEST)]


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_checkov_finds_nothing(render, values, tmp_path):
    passed, found = failed(render(values), tmp_path)
    assert not found
    assert passed > 100


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_checkov_finds_nothing_in_the_values_for_large_models(render, path, tmp_path):
    _, found = failed(render(PLAIN, "--values", path), tmp_path)
    assert not found


def test_checkov_would_find_what_must_not_be(render, tmp_path):
    objects = render(PLAIN)
    for each in objects:
        if each["kind"] == "StatefulSet":
            spec = each["spec"]["template"]["spec"]
            spec["containers"][0]["securityContext"] |= {"privileged": True, "allowPrivilegeEscalation": True}
            del spec["containers"][0]["resources"]["limits"]
            spec["securityContext"] |= {"runAsNonRoot": False, "runAsUser": 0}
    _, found = failed(objects, tmp_path)
    ids = {each[0] for each in found}
    assert {"CKV_K8S_16", "CKV_K8S_20", "CKV_K8S_13", "CKV_K8S_11", "CKV_K8S_23"} <= ids, ids
