"""Chart, compose file and images give the binaries only flags and variables that those know."""

import re

import pytest
import yaml
from chart_objects import all_pods, the_container
from chart_values import ACCEPTED
from conftest import REPOSITORY, run


@pytest.fixture(scope="module")
def help_of():
    """What `--help` of a binary says; `make test-service` builds them first."""

    def text(name, *command):
        binary = REPOSITORY / "target" / "debug" / name
        assert binary.is_file(), f"{binary} is missing; `make test-service` builds it"
        done = run(binary, *command, "--help")
        assert done.returncode == 0, done.stderr
        return done.stdout

    return {"coordinator": text("coordinator"), "worker": text("worker"), "test": text("espalier", "workers")}


def assert_known(help_text, arguments, variables):
    flags = set(re.findall(r"(--[a-z][a-z-]*)", help_text))
    known = set(re.findall(r"\[env:\s+([A-Z_]+)", help_text))
    for argument in arguments:
        assert not argument.startswith("--") or argument in flags, argument
    for variable in variables:
        assert not variable.startswith(("ESPALIER_", "RUST_", "OTEL_")) or variable in known, variable


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda name: name.replace(" ", "-"))
def test_the_chart_gives_flags_that_the_binaries_know(case, render, help_of):
    for _, pod in all_pods(render(ACCEPTED[case])):
        container = the_container(pod)
        assert_known(help_of[container["name"]], container["args"], [one["name"] for one in container.get("env", [])])


def test_the_compose_file_gives_flags_that_the_binaries_know(help_of):
    services = yaml.safe_load((REPOSITORY / "deploy" / "compose.yaml").read_text())["services"]
    services = {name: service for name, service in services.items() if service["image"].startswith("espalier-")}
    for name, service in services.items():
        assert_known(help_of[name.split("-")[0]], service["command"], service["environment"])


@pytest.mark.parametrize("name", ["coordinator", "worker"])
def test_the_images_set_variables_that_the_binaries_know(name, help_of):
    text = (REPOSITORY / "deploy" / "docker" / f"{name}.Dockerfile").read_text()
    variables = re.findall(r"\b(ESPALIER_[A-Z_]+)=", text)
    assert variables
    assert_known(help_of[name], [], variables)
