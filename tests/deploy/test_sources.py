"""Linters over shell scripts, YAML and the schemas between processes."""

import json

import pytest
from conftest import REPOSITORY, run, tool

SHELL_SCRIPTS = sorted([*REPOSITORY.glob("scripts/*.sh"), REPOSITORY / ".ci" / "run"])
YAML_FILES = sorted(
    [
        *REPOSITORY.glob("deploy/**/*.yaml"),
        *(REPOSITORY / "helm" / "espalier").glob("*.yaml"),
        REPOSITORY / "proto" / "buf.yaml",
    ]
)
YAMLLINT = {
    "extends": "default",
    "rules": {
        "line-length": {"max": 140},
        "document-start": "disable",
        "comments": {"min-spaces-from-content": 1},
        "braces": {"max-spaces-inside": 1},
    },
}


def named(path):
    return str(path.relative_to(REPOSITORY))


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=named)
def test_shellcheck_finds_nothing(script):
    done = run(tool("shellcheck"), script)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", YAML_FILES, ids=named)
def test_yamllint_finds_nothing(file):
    done = run(tool("yamllint"), "--strict", "--config-data", json.dumps(YAMLLINT), file)
    assert done.returncode == 0, done.stdout


def test_buf_lint_finds_nothing_in_the_schemas():
    done = run(tool("buf"), "lint", cwd=REPOSITORY / "proto")
    assert done.returncode == 0, done.stdout + done.stderr


def test_scripts_parse_under_the_oldest_python_that_setup_takes():
    import ast

    for script in REPOSITORY.glob("scripts/*.py"):
        ast.parse(script.read_text(), feature_version=(3, 9))


def test_every_make_target_is_listed_by_help():
    listed = run("make", "--no-print-directory", "help", cwd=REPOSITORY).stdout
    for target in ("setup", "build", "demo", "test", "test-interop", "lint", "clean"):
        assert f"make {target} " in listed
