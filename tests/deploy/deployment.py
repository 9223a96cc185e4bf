"""A real coordinator and a real worker for the tests of clients, in plain text or with TLS and tokens."""

import re
import socket
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY, end, run

PACKAGE = REPOSITORY / "deploy" / "clients" / "python"
FIXTURES = REPOSITORY / "tests" / "fixtures"
MODEL = FIXTURES / "models" / "gqa"
TEXT = FIXTURES / "text" / "tiny.txt"
HELD_OUT = FIXTURES / "text" / "held_out.txt"
CALL_S = 60


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(ready, what):
    give_up = time.monotonic() + CALL_S
    while time.monotonic() < give_up:
        try:
            if found := ready():
                return found
        except (OSError, ValueError):
            pass
        time.sleep(0.1)
    raise AssertionError(f"{what} did not come about within {CALL_S} s")


class Deployment:
    """A coordinator at a fixed port, and a worker.

    With `secure`, each has a certificate of one authority, and people need tokens: `ca`, and `tokens` by role.
    """

    def __init__(self, folder, secure=False):
        self.folder, self.secure = folder, secure
        self.address = f"127.0.0.1:{free_port()}"
        self.url = f"{'https' if secure else 'http'}://{self.address}"
        self.processes = {}
        self.ca, self.tokens = folder / "ca.crt", {}
        if secure:
            self._certificates()
            lines = [self._token(role) for role in ("read", "operate")]
            (folder / "tokens").write_text("\n".join(lines) + "\n")

    def _certificates(self):
        """A private authority and two certificates, as docs/security.md makes them."""

        def openssl(*arguments):
            done = run("openssl", *arguments, cwd=self.folder)
            assert done.returncode == 0, done.stderr

        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
        openssl("req", "-x509", *curve, "-days", "2", "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=trial")
        for name in ("coordinator", "worker"):
            openssl("req", *curve, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
            (self.folder / "san").write_text(f"subjectAltName=DNS:espalier-{name},DNS:localhost,IP:127.0.0.1\n")
            signed = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "san")
            openssl("x509", "-req", "-in", f"{name}.csr", *signed, "-out", f"{name}.crt")

    def _token(self, role):
        done = run(REPOSITORY / "target" / "debug" / "espalier", "token", "create", "--name", role, "--role", role)
        assert done.returncode == 0, done.stderr
        (self.tokens[role],) = re.findall(r"^espalier_\w+$", done.stdout, re.MULTILINE)
        (line,) = re.findall(rf"^{role} {role} sha256:\w+$", done.stdout, re.MULTILINE)
        return line

    def spawn(self, name, *arguments):
        binary = REPOSITORY / "target" / "debug" / name
        assert binary.is_file(), f"{binary} is missing; `make test-service` builds it"
        security = []
        if self.secure:
            for flag, file in (("tls-cert", f"{name}.crt"), ("tls-key", f"{name}.key"), ("tls-ca", "ca.crt"), ("tls-client-ca", "ca.crt")):
                security += [f"--{flag}", self.folder / file]
        roots = ("--root", self.folder, "--root", FIXTURES)
        with (self.folder / f"{name}.log").open("a") as log:
            self.processes[name] = subprocess.Popen(
                [str(part) for part in (binary, *roots, *security, *arguments)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def start_coordinator(self):
        tokens = ["--tokens", self.folder / "tokens"] if self.secure else []
        self.spawn("coordinator", "--listen", self.address, "--data-dir", self.folder / "state", "--lease-seconds", "3", *tokens)

    def start_worker(self):
        self.spawn("worker", "--listen", "127.0.0.1:0", "--coordinator", self.url, "--threads", "1")

    def start(self):
        self.start_coordinator()
        self.start_worker()
        wait_for(lambda: " registered" in (self.folder / "worker.log").read_text(), "a worker that is registered")

    def kill_coordinator(self):
        self.processes["coordinator"].kill()
        self.processes["coordinator"].wait(CALL_S)

    def stop(self):
        end(self.processes.values())


def started(folder, secure=False):
    """For a fixture to yield from."""
    deployment = Deployment(folder, secure)
    try:
        deployment.start()
        yield deployment
    finally:
        deployment.stop()


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    yield from started(tmp_path_factory.mktemp("deployment"))


@pytest.fixture(scope="module")
def secure_deployment(tmp_path_factory):
    yield from started(tmp_path_factory.mktemp("secure"), secure=True)


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    """The folder with the Python client and freshly made stubs, importable."""
    folder = tmp_path_factory.mktemp("client")
    done = run(sys.executable, PACKAGE / "generate.py", "--out", folder)
    assert done.returncode == 0, done.stderr
    (folder / "espalier_client").symlink_to(PACKAGE / "espalier_client")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def spec(steps, out=None):
    """A run of the tiny model on one worker."""
    from espalier.v1 import data_pb2, recipe_pb2
    from espalier.v1 import run_service_pb2 as pb

    return pb.RunSpec(
        model=str(MODEL),
        training_data=[data_pb2.TextSource(path=str(TEXT))],
        recipe=recipe_pb2.Recipe(steps=steps, batch=recipe_pb2.Batch(window_tokens=64, rows=4, micro_batches=2)),
        tp_degree=1,
        durability=pb.DurabilitySpec(checkpoint_every_steps=5),
        export=pb.ExportSpec(path=str(out)) if out else None,
    )
