"""The Python client against a real coordinator and worker: types, errors, retries, and a coordinator that is killed."""

import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import REPOSITORY, run, tool

PACKAGE = REPOSITORY / "deploy" / "clients" / "python"
FIXTURES = REPOSITORY / "tests" / "fixtures"
CALL_S = 60


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The client beside freshly made stubs, importable."""
    folder = tmp_path_factory.mktemp("client")
    done = run(sys.executable, PACKAGE / "generate.py", "--out", folder)
    assert done.returncode == 0, done.stderr
    (folder / "espalier_client").symlink_to(PACKAGE / "espalier_client")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


class Deployment:
    """A coordinator at a fixed port, and a worker."""

    def __init__(self, folder):
        self.folder = folder
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        self.processes = {}

    def spawn(self, name, *arguments):
        binary = REPOSITORY / "target" / "debug" / name
        assert binary.is_file(), f"{binary} is missing; `make test-deploy` builds it"
        command = [str(part) for part in (binary, "--root", self.folder, "--root", FIXTURES, *arguments)]
        with (self.folder / f"{name}.log").open("a") as log:
            self.processes[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def start_coordinator(self):
        self.spawn("coordinator", "--listen", self.address, "--data-dir", self.folder / "state", "--lease-seconds", "3")

    def start_worker(self):
        coordinator = f"http://{self.address}"
        self.spawn("worker", "--listen", "127.0.0.1:0", "--coordinator", coordinator, "--threads", "1")

    def kill_coordinator(self):
        self.processes["coordinator"].kill()
        self.processes["coordinator"].wait(CALL_S)

    def stop(self):
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(CALL_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    deployment = Deployment(tmp_path_factory.mktemp("deployment"))
    try:
        deployment.start_coordinator()
        deployment.start_worker()
        yield deployment
    finally:
        deployment.stop()


@pytest.fixture
def client(package, deployment):
    from espalier_client import Client

    with Client(deployment.address, timeout=CALL_S) as client:
        yield client


def spec(deployment, steps, out=None):
    from espalier.v1 import data_pb2, recipe_pb2
    from espalier.v1 import run_service_pb2 as pb

    return pb.RunSpec(
        model=str(FIXTURES / "models" / "gqa"),
        training_data=[data_pb2.TextSource(path=str(FIXTURES / "text" / "tiny.txt"))],
        recipe=recipe_pb2.Recipe(steps=steps, batch=recipe_pb2.Batch(window_tokens=64, rows=4, micro_batches=2)),
        tp_degree=1,
        durability=pb.DurabilitySpec(checkpoint_every_steps=5),
        export=pb.ExportSpec(path=str(deployment.folder / out)) if out else None,
    )


def test_the_package_is_typed(package):
    config = PACKAGE / "pyproject.toml"
    done = subprocess.run(
        [tool("mypy"), "--config-file", str(config), "-p", "espalier_client"],
        cwd=package,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_run_is_followed_through_the_death_of_its_coordinator(client, deployment):
    run_id = client.create(spec(deployment, 80, "survivor"), "once").id
    killed = threading.Event()

    def kill():
        deployment.kill_coordinator()
        killed.set()
        time.sleep(1)
        deployment.start_coordinator()

    revisions = []
    killer = threading.Thread(target=kill)
    for event in client.watch(run_id):
        revisions.append(event.revision)
        if event.WhichOneof("kind") == "step" and event.step.step == 20 and not killer.is_alive() and not killed.is_set():
            killer.start()
    killer.join()
    assert killed.is_set()
    assert revisions == list(range(1, len(revisions) + 1))
    from espalier.v1 import run_service_pb2 as pb

    run = client.wait(run_id)
    assert run.state == pb.RUN_STATE_SUCCEEDED and run.restarts >= 1
    # The same request, after all that: the same run.
    assert client.create(spec(deployment, 80, "survivor"), "once").id == run_id


def test_what_was_exported_is_fetched_in_parts_and_checked(client, deployment, tmp_path):
    run_id = client.create(spec(deployment, 80, "survivor"), "once").id
    artifacts = {each.name: each for each in client.artifacts(run_id)}
    (tmp_path / "model.safetensors.part").write_bytes((deployment.folder / "survivor" / "model.safetensors").read_bytes()[:1000])
    for path in client.download(run_id, tmp_path):
        assert path.read_bytes() == (deployment.folder / "survivor" / path.name).read_bytes()
        assert path.stat().st_size == artifacts.pop(path.name).size_bytes
    assert not artifacts


def test_an_exported_model_is_evaluated_and_written_again(client, deployment):
    from espalier.v1 import data_pb2
    from espalier.v1 import run_service_pb2 as pb

    run_id = client.create(spec(deployment, 80, "survivor"), "once").id
    held_out = data_pb2.EvaluationSpec(
        sources=[data_pb2.TextSource(path=str(FIXTURES / "text" / "held_out.txt"))], window_tokens=64
    )
    (measured,) = client.evaluate(run_id, held_out)
    assert measured.perplexity > 1
    again = client.export(run_id, pb.ExportSpec(path=str(deployment.folder / "again")))
    assert again.parameters > 0 and (deployment.folder / "again" / "config.json").is_file()


def test_errors_say_what_is_wrong_field_by_field(client, deployment):
    from espalier_client import EspalierError

    wrong = spec(deployment, 4)
    wrong.model = "/etc"
    wrong.tp_degree = 0
    with pytest.raises(EspalierError) as caught:
        client.plan(wrong)
    assert (caught.value.code, caught.value.reason) == ("INVALID_ARGUMENT", "INVALID_FIELDS")
    assert {"spec.model", "spec.tp_degree"} <= {each.field for each in caught.value.violations}
    with pytest.raises(EspalierError) as caught:
        client.get("run-000000000000")
    assert (caught.value.code, caught.value.reason) == ("NOT_FOUND", "RUN_NOT_FOUND")


def test_a_run_that_ends_badly_is_an_exception(client, deployment):
    from espalier_client import RunFailed

    run_id = client.create(spec(deployment, 5000)).id
    client.cancel(run_id)
    with pytest.raises(RunFailed) as caught:
        client.wait(run_id)
    assert caught.value.run.id == run_id


def test_a_call_waits_for_a_coordinator_that_is_away(client, deployment):
    run_id = client.create(spec(deployment, 80, "survivor"), "once").id
    deployment.kill_coordinator()
    starting = threading.Timer(2, deployment.start_coordinator)
    starting.start()
    assert client.get(run_id).id == run_id
    starting.join()


def test_a_token_is_not_sent_to_another_machine_in_plain_text(package):
    from espalier_client import Client

    with pytest.raises(ValueError, match=r"192\.0\.2\.1"):
        Client("192.0.2.1:7070", token="secret")
