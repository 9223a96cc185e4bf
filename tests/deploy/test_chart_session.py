"""The session of docs/kubernetes.md, typed against the processes that the chart starts: its own arguments, on this machine's CPU.

What is changed: addresses are loopback's, volumes are folders, GPUs are one thread each, and LLaMA 13B is a model of 260 thousand parameters.
"""

import json
import re
import shlex
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest
import yaml
from chart_objects import option, owners, template, the_container
from chart_values import PLAIN
from conftest import CHART, REPOSITORY

FIXTURES = REPOSITORY / "tests" / "fixtures"
DOCUMENT = (REPOSITORY / "docs" / "kubernetes.md").read_text()
CALL_S = 60
PATIENCE_S = 300


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)


def documented_run():
    (found,) = [block for block in blocks("yaml") if block.startswith("# run.yaml\n")]
    return yaml.safe_load(found)


def documented_commands():
    """The lines that call `espalier` on a run, in their order."""
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("espalier ")]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Installation:
    """Every process of what the chart renders to."""

    def __init__(self, objects, folder):
        self.folder = folder
        self.processes = []
        self.ready = []
        self.grace = {}
        found = {each["metadata"]["name"]: each["spec"]["replicas"] for each in owners(objects)}
        self.pods = {f"{name}-{number}": 0 for name, replicas in found.items() for number in range(replicas)}
        self.ports = {pod: free_port() for pod in self.pods}
        self.address = f"127.0.0.1:{next(port for pod, port in self.ports.items() if '-coordinator-' in pod)}"
        for owner in owners(objects):
            spec = template(owner)["spec"]
            for number in range(owner["spec"]["replicas"]):
                self.start(f"{owner['metadata']['name']}-{number}", spec)

    def start(self, pod, spec):
        container = the_container(spec)
        metrics = free_port()
        (advertised,) = option(container, "--advertise") or [None]
        replaced = {
            f"0.0.0.0:{container['ports'][0]['containerPort']}": f"127.0.0.1:{self.ports[pod]}",
            f"0.0.0.0:{container['ports'][1]['containerPort']}": f"127.0.0.1:{metrics}",
            advertised: f"http://127.0.0.1:{self.ports[pod]}",
            "cuda": "cpu",
        }
        for each in option(container, "--coordinator"):
            replaced[each] = f"http://{self.address}"
        for each in option(container, "--threads"):
            replaced[each] = "1"
        arguments = [replaced.get(each, self.path(each)) for each in container["args"]]
        environment = {each["name"]: each.get("value", pod) for each in container["env"] if not each["name"].startswith("NCCL_")}
        binary = REPOSITORY / "target" / "debug" / container["name"]
        assert binary.is_file(), f"{binary} is missing; `make test-deploy` builds it"
        with (self.folder / f"{pod}.log").open("w") as log:
            process = subprocess.Popen([binary, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        self.processes.append((pod, process))
        self.grace[pod] = spec["terminationGracePeriodSeconds"]
        self.ready.append(f"http://127.0.0.1:{metrics}/readyz")

    def path(self, argument):
        """A path of the pods, where it is here."""
        return re.sub(r"^/(models|data|out|var/lib/espalier)\b", lambda found: f"{self.folder}/{found[1]}", argument)

    def log(self):
        return "\n".join(path.read_text()[-4000:] for path in sorted(self.folder.glob("*.log")))

    def wait(self):
        give_up = time.monotonic() + CALL_S
        for url in self.ready:
            while True:
                assert time.monotonic() < give_up, f"{url} is not ready:\n{self.log()}"
                try:
                    with urllib.request.urlopen(url, timeout=5):
                        break
                except (urllib.error.URLError, ConnectionError):
                    time.sleep(0.1)

    def stop(self):
        """As a pod is ended; statuses by pod."""
        for _, process in reversed(self.processes):
            process.terminate()
        statuses = {}
        for pod, process in self.processes:
            try:
                statuses[pod] = process.wait(self.grace[pod])
            except subprocess.TimeoutExpired:
                process.kill()
                statuses[pod] = process.wait()
        self.processes = []
        return statuses


@pytest.fixture(scope="module")
def installation(render, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    for name in ("models", "data", "out", "var/lib/espalier"):
        (folder / name).mkdir(parents=True)
    shutil.copytree(FIXTURES / "models" / "stories260k", folder / "models" / "llama-13b")
    shutil.copy(FIXTURES / "text" / "tinystories.txt", folder / "data" / "train.txt")
    shutil.copy(FIXTURES / "text" / "held_out.txt", folder / "data" / "test.txt")
    values = yaml.safe_load((CHART / "values" / "llama-13b-4-gpus.yaml").read_text())
    installation = Installation(render({**PLAIN, **values}), folder)
    try:
        installation.wait()
        yield installation
    finally:
        statuses = installation.stop()
    assert set(statuses.values()) == {0}, (statuses, installation.log())


def small(spec, installation):
    """The documented run, for a small model on CPUs."""
    spec["model"] = installation.path(spec["model"])
    spec["export"]["path"] = installation.path(spec["export"]["path"])
    spec["data"] = [{"path": installation.path("/data/train.txt")}]
    spec["evaluation"] = {"data": [{"path": installation.path("/data/test.txt")}], "window_tokens": 64}
    recipe = spec["recipe"]
    recipe["batch"] = {"window_tokens": 64, "rows": 2, "micro_batches": 1}
    recipe["steps"] = 40
    recipe["pruning"]["compensation"]["least_squares"]["windows"] = 4
    recipe["precision"] = {"compute": "f32", "storage": "bf16"}
    return spec


def test_the_documented_session_prunes_a_model_on_what_the_chart_starts(installation, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(small(documented_run(), installation)))
    shutil.copy(installation.folder / "models" / "llama-13b" / "config.json", tmp_path)
    binary = REPOSITORY / "target" / "debug" / "espalier"
    said, name = {}, None
    for words in documented_commands():
        words = [name if word == "RUN" else word for word in words]
        done = subprocess.run(
            [binary, *words],
            cwd=tmp_path,
            env={"ESPALIER_COORDINATOR_URL": f"http://{installation.address}"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, (words, done.stdout, done.stderr, installation.log())
        print(f"$ espalier {' '.join(words)}\n{done.stdout}{done.stderr}")
        said[words[0]] = done.stdout
        if words[0] == "create" and "--validate-only" not in words:
            name = re.search(r"[0-9a-f]{8}-[0-9a-f-]{27}|run-[a-z0-9-]+", done.stdout)[0]
    assert {"plan", "workers", "create", "watch", "get", "artifacts", "download"} <= set(said)
    assert said["workers"].count("idle") == 4
    dense = json.loads((tmp_path / "config.json").read_text())
    pruned = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert pruned["num_key_value_heads"] * 2 == dense["num_key_value_heads"]
    # Half, as far as it divides over four devices.
    assert 0 <= dense["intermediate_size"] / 2 - pruned["intermediate_size"] < 4
