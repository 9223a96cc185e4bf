"""The Python client against a real coordinator and worker: types, errors, retries, and a coordinator that is killed."""

import re
import socket
import subprocess
import sys
import threading
import time
from concurrent import futures

import grpc
import pytest
from conftest import run, tool
from deployment import CALL_S, HELD_OUT, PACKAGE, deployment, free_port, package, secure_deployment, spec


@pytest.fixture
def client(package, deployment):
    from espalier_client import Client

    with Client(deployment.address, timeout=CALL_S) as client:
        yield client


@pytest.fixture
def survivor(client, deployment):
    """A run that has ended; made by the first test that needs it."""
    run_id = client.create(spec(80, deployment.folder / "survivor"), "once").id
    client.wait(run_id)
    return run_id


def mypy(folder, *arguments):
    done = subprocess.run(
        [tool("mypy"), "--config-file", str(PACKAGE / "pyproject.toml"), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def readme_example():
    (example,) = re.findall(r"^```python\n(.*?)^```", (PACKAGE / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    return example


def test_the_package_is_typed(package):
    mypy(package, "-p", "espalier_client")


def test_the_package_is_built_and_installed_as_its_page_says(tmp_path):
    source = tmp_path / "source"
    copied = run("cp", "-r", PACKAGE, source)
    assert copied.returncode == 0, copied.stderr
    made = run(sys.executable, source / "generate.py", "--proto", PACKAGE.parents[2] / "proto")
    assert made.returncode == 0, made.stderr
    install = ("install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", tmp_path / "installed", source)
    installed = run(sys.executable, "-m", "pip", *install)
    assert installed.returncode == 0, installed.stderr
    # Whoever installed it has the types too.
    (tmp_path / "installed" / "example.py").write_text(readme_example())
    mypy(tmp_path / "installed", "example.py")
    imported = run(sys.executable, "-c", "import espalier_client as it; print(it.__file__)", cwd=tmp_path / "installed")
    assert imported.stdout.startswith(str(tmp_path)), imported.stderr


def test_a_run_is_followed_through_the_death_of_its_coordinator(client, deployment):
    from espalier.v1 import run_service_pb2 as pb

    run_id = client.create(spec(80, deployment.folder / "survivor"), "once").id
    revisions, killer = [], None

    def kill():
        deployment.kill_coordinator()
        time.sleep(1)
        deployment.start_coordinator()

    for event in client.watch(run_id):
        revisions.append(event.revision)
        if killer is None and event.step.step == 20:
            killer = threading.Thread(target=kill)
            killer.start()
    killer.join()
    run = client.wait(run_id)
    assert run.state == pb.RUN_STATE_SUCCEEDED and run.restarts >= 1
    assert revisions == list(range(1, run.revision + 1))
    # The same request, after all that: the same run.
    assert client.create(spec(80, deployment.folder / "survivor"), "once").id == run_id


def test_a_run_is_followed_through_a_restart_in_good_order(client, deployment):
    run_id = client.create(spec(80)).id
    revisions, stopped = [], None
    for event in client.watch(run_id):
        revisions.append(event.revision)
        if stopped is None and event.step.step == 20:
            stopped = deployment.processes["coordinator"]
            stopped.terminate()
            assert stopped.wait(CALL_S) == 0
            deployment.start_coordinator()
    assert stopped is not None
    assert revisions == list(range(1, client.get(run_id).revision + 1))


class Wire:
    """A way to the coordinator that can be cut, and is whole again at once."""

    def __init__(self, target):
        self.target, self.lines = target, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            host, port = self.target.rsplit(":", 1)
            far = socket.create_connection((host, int(port)))
            self.lines.append((near, far))
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self.carry, args=(one, other), daemon=True).start()

    @staticmethod
    def carry(one, other):
        try:
            while data := one.recv(1 << 16):
                other.sendall(data)
        except OSError:
            pass

    def cut(self):
        for end in self.lines[-1]:
            end.shutdown(socket.SHUT_RDWR)
            end.close()


def test_a_run_is_followed_over_a_connection_that_is_cut_again_and_again(client, deployment):
    from espalier_client import Client

    wire = Wire(deployment.address)
    run_id = client.create(spec(60)).id
    revisions, cuts, lost = [], [5, 6, 40], 0
    with Client(wire.address, timeout=CALL_S) as cut_off:
        for event in cut_off.watch(run_id):
            revisions.append(event.revision)
            # Events that were on their way still come after a cut: the next one is for the next connection.
            if cuts and event.revision >= cuts[0] and len(wire.lines) > lost:
                lost = len(wire.lines)
                wire.cut()
                del cuts[0]
    wire.listener.close()
    assert not cuts and len(wire.lines) >= 4, "each cut makes a new connection"
    assert revisions == list(range(1, client.get(run_id).revision + 1))


def test_patience_has_an_end(package):
    from espalier_client import Client, EspalierError

    began = time.monotonic()
    with Client(f"127.0.0.1:{free_port()}", timeout=1, patience=1) as client, pytest.raises(EspalierError) as caught:
        list(client.watch("run-000000000000"))
    assert caught.value.code == "UNAVAILABLE"
    assert 1 <= time.monotonic() - began < 20


@pytest.fixture
def unable(package):
    """A coordinator that opens every stream and breaks it off at once, as one whose store is away."""
    from espalier.v1 import run_service_pb2_grpc

    class Unable(run_service_pb2_grpc.RunServiceServicer):
        def WatchRun(self, request, context):
            context.send_initial_metadata(())
            time.sleep(0.02)
            context.abort(grpc.StatusCode.UNAVAILABLE, "the store is away")
            yield

    server = grpc.server(futures.ThreadPoolExecutor(2))
    run_service_pb2_grpc.add_RunServiceServicer_to_server(Unable(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_patience_has_an_end_with_streams_that_break_as_soon_as_they_are_open(unable):
    from espalier_client import Client, EspalierError

    began = time.monotonic()
    with Client(unable, patience=1) as client, pytest.raises(EspalierError, match="the store is away") as caught:
        # Broken off here if it does not end by itself.
        threading.Timer(30, client.close).start()
        list(client.watch("run-000000000000"))
    assert caught.value.code == "UNAVAILABLE"
    assert 1 <= time.monotonic() - began < 20


def test_a_call_that_may_take_hours_does_not_wait_as_long_for_a_coordinator(package):
    from espalier.v1 import data_pb2
    from espalier.v1 import run_service_pb2 as pb
    from espalier_client import Client, EspalierError

    with Client(f"127.0.0.1:{free_port()}", timeout=1) as client:
        for call in (
            lambda: client.evaluate("run-000000000000", data_pb2.EvaluationSpec()),
            lambda: client.export("run-000000000000", pb.ExportSpec()),
        ):
            began = time.monotonic()
            with pytest.raises(EspalierError) as caught:
                call()
            assert caught.value.code == "UNAVAILABLE" and time.monotonic() - began < 20


def test_with_tls_and_a_token(package, secure_deployment, tmp_path):
    from espalier_client import Client, EspalierError, Tls

    tls = Tls(ca=secure_deployment.ca)
    address, tokens = secure_deployment.address, secure_deployment.tokens
    with Client(address, tls=tls, token=tokens["operate"], timeout=CALL_S) as client:
        run_id = client.create(spec(6, secure_deployment.folder / "out")).id
        client.wait(run_id)
        assert "config.json" in {path.name for path in client.download(run_id, tmp_path)}
    with Client(address, tls=tls, token=tokens["read"], timeout=CALL_S) as client:
        assert client.get(run_id).id == run_id
        with pytest.raises(EspalierError) as caught:
            client.cancel(run_id)
        assert caught.value.code == "PERMISSION_DENIED"
    for token in (None, "espalier_wrong"):
        with Client(address, tls=tls, token=token, timeout=CALL_S) as client:
            with pytest.raises(EspalierError) as caught:
                client.get(run_id)
            assert caught.value.code == "UNAUTHENTICATED"
    strange = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key", "-out", "crt", "-subj", "/CN=trial")
    made = run("openssl", *strange, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    with Client(address, tls=Tls(ca=tmp_path / "crt"), token=tokens["read"], timeout=2) as client:
        with pytest.raises(EspalierError) as caught:
            client.get(run_id)
        assert caught.value.code == "UNAVAILABLE" and "CERTIFICATE_VERIFY_FAILED" in caught.value.message, caught.value


def test_what_was_exported_is_fetched_in_parts_and_checked(client, deployment, survivor, tmp_path):
    artifacts = {each.name: each for each in client.artifacts(survivor)}
    exported = deployment.folder / "survivor"
    (tmp_path / "model.safetensors.part").write_bytes((exported / "model.safetensors").read_bytes()[:1000])
    # Left by another model.
    (tmp_path / "tokenizer.json.part").write_bytes(bytes(artifacts["tokenizer.json"].size_bytes + 1))
    for path in client.download(survivor, tmp_path):
        assert path.read_bytes() == (exported / path.name).read_bytes()
        assert path.stat().st_size == artifacts.pop(path.name).size_bytes
    assert not artifacts
    # What was there in part is not what was exported.
    (tmp_path / "config.json.part").write_bytes(b"x")
    with pytest.raises(OSError, match=r"config\.json has SHA-256"):
        client.download(survivor, tmp_path)
    assert not (tmp_path / "config.json.part").exists()


def test_an_exported_model_is_evaluated_and_written_again(client, deployment, survivor):
    from espalier.v1 import data_pb2
    from espalier.v1 import run_service_pb2 as pb

    held_out = data_pb2.EvaluationSpec(sources=[data_pb2.TextSource(path=str(HELD_OUT))], window_tokens=64)
    (measured,) = client.evaluate(survivor, held_out)
    assert measured.perplexity > 1
    again = client.export(survivor, pb.ExportSpec(path=str(deployment.folder / "again")))
    assert again.parameters > 0 and (deployment.folder / "again" / "config.json").is_file()


def test_errors_say_what_is_wrong_field_by_field(client, deployment):
    from espalier_client import EspalierError

    wrong = spec(4)
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

    run_id = client.create(spec(5000)).id
    client.cancel(run_id)
    with pytest.raises(RunFailed) as caught:
        client.wait(run_id)
    assert caught.value.run.id == run_id


def test_a_run_is_paused_and_goes_on(client):
    from espalier.v1 import run_service_pb2 as pb

    run_id = client.create(spec(200)).id
    events = client.watch(run_id)
    next(event for event in events if event.step.step == 10)
    client.pause(run_id)
    give_up = time.monotonic() + CALL_S
    while (run := client.get(run_id)).state != pb.RUN_STATE_PAUSED:
        assert time.monotonic() < give_up, run
        time.sleep(0.1)
    assert run.last_step.step < 199
    client.resume(run_id)
    # Steps are counted from 0.
    assert [each.step.step for each in events if each.step.step][-1] == 199
    assert client.wait(run_id).state == pb.RUN_STATE_SUCCEEDED


def test_a_call_waits_for_a_coordinator_that_is_away(client, deployment, survivor):
    deployment.kill_coordinator()
    starting = threading.Timer(2, deployment.start_coordinator)
    starting.start()
    assert client.get(survivor).id == survivor
    starting.join()


def test_a_token_is_not_sent_to_another_machine_in_plain_text(package):
    from espalier_client import Client

    with pytest.raises(ValueError, match=r"192\.0\.2\.1"):
        Client("192.0.2.1:7070", token="secret")
