"""Shared by the checks of chart, images, compose file and scripts. No check is left out: a missing tool fails it."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
CHART = REPOSITORY / "helm" / "espalier"
DEADLINE_S = 60

sys.path.insert(0, str(REPOSITORY / "scripts"))


def tool(name):
    """A tool of this environment, never one that happens to be on the machine."""
    path = Path(sys.executable).parent / name
    assert path.is_file(), f"{path} is missing; `make test-service` makes the environment"
    return str(path)


def run(*command, **options):
    """Runs to the end and returns status, stdout and stderr."""
    return subprocess.run(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        **options,
    )


def end(processes):
    """Asks all to end, then waits; what has not ended by then is killed."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def helm_template(values, *arguments):
    """`helm template` with `values` (a mapping) over the chart's own."""
    return subprocess.run(
        [tool("helm"), "template", "trial", str(CHART), "--namespace", "pruning", "--values", "-", *arguments],
        input=yaml.safe_dump(values),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


@pytest.fixture(scope="session")
def render():
    """Renders the chart with some values into a list of objects."""

    def rendered(values, *arguments):
        done = helm_template(values, *arguments)
        assert done.returncode == 0, done.stderr
        return [document for document in yaml.safe_load_all(done.stdout) if document]

    return rendered
