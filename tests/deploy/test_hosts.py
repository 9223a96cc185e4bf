"""Coordinator and workers on hosts of their own: network namespaces on one bridge, with and without mTLS, and cut off in mid-run.

Needs root, as namespaces do.
"""

import hashlib
import os
import re
import shutil
import subprocess
import time

import pytest
import yaml
from conftest import REPOSITORY, end, run

pytestmark = pytest.mark.host

FIXTURES = REPOSITORY / "tests" / "fixtures"
HOSTS = {"c": 1, "w0": 10, "w1": 11, "w2": 12}
CUT_S = 30
PATIENCE_S = 240
CALL_S = 60
STEPS = 300


def ip(*arguments):
    done = run("ip", *arguments)
    assert done.returncode == 0, f"ip {' '.join(map(str, arguments))}: {done.stderr}"
    return done.stdout


class Network:
    """A bridge and a namespace for each host."""

    def __init__(self):
        assert os.geteuid() == 0, "network namespaces need root"
        assert shutil.which("ip"), "`ip` is missing: apt-get install iproute2"
        self.prefix = f"espalier-{os.getpid()}"
        self.hub = f"{self.prefix}-hub"

    def namespace(self, host):
        return f"{self.prefix}-{host}"

    def address(self, host):
        return f"10.77.0.{HOSTS[host]}"

    def start(self):
        ip("netns", "add", self.hub)
        ip("-n", self.hub, "link", "add", "bridge", "type", "bridge")
        ip("-n", self.hub, "link", "set", "bridge", "up")
        for host in HOSTS:
            own = self.namespace(host)
            ip("netns", "add", own)
            ip("-n", self.hub, "link", "add", host, "type", "veth", "peer", "name", "eth0", "netns", own)
            ip("-n", self.hub, "link", "set", host, "master", "bridge", "up")
            ip("-n", own, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", own, "link", "set", device, "up")

    def cut_off(self, host):
        """Nothing reaches the host any more, and nobody is told."""
        ip("-n", self.hub, "link", "set", host, "nomaster")

    def join_again(self, host):
        ip("-n", self.hub, "link", "set", host, "master", "bridge")

    def part(self, one, other):
        """What the two send to each other goes nowhere; all else arrives."""
        for here, there in ((one, other), (other, one)):
            nobody = ("lladdr", "02:00:00:00:00:99", "nud", "permanent", "dev", "eth0")
            ip("-n", self.namespace(here), "neigh", "replace", self.address(there), *nobody)

    def unite(self, one, other):
        for here, there in ((one, other), (other, one)):
            ip("-n", self.namespace(here), "neigh", "del", self.address(there), "dev", "eth0")

    def stop(self):
        for name in [self.namespace(host) for host in HOSTS] + [self.hub]:
            run("ip", "netns", "delete", name)


@pytest.fixture(scope="module")
def network():
    network = Network()
    try:
        network.start()
        yield network
    finally:
        network.stop()


def certificates(folder, network):
    """A private authority and a certificate for each host, as docs/security.md makes them."""

    def openssl(*arguments):
        done = run("openssl", *arguments, cwd=folder)
        assert done.returncode == 0, done.stderr

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl("req", "-x509", *curve, "-days", "2", "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=trial")
    for host in HOSTS:
        role = "espalier-coordinator" if host == "c" else "espalier-worker"
        openssl("req", *curve, "-keyout", f"{host}.key", "-out", f"{host}.csr", "-subj", f"/CN={host}")
        (folder / "san").write_text(f"subjectAltName=DNS:{role},IP:{network.address(host)}\n")
        signed = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "san")
        openssl("x509", "-req", "-in", f"{host}.csr", *signed, "-out", f"{host}.crt")


def token(folder):
    """A token for people: certificates are for processes."""
    done = run(REPOSITORY / "target" / "debug" / "espalier", "token", "create", "--name", "anna", "--role", "operate")
    assert done.returncode == 0, done.stderr
    (secret,) = re.findall(r"^espalier_\w+$", done.stdout, re.MULTILINE)
    (line,) = re.findall(r"^anna operate sha256:\w+$", done.stdout, re.MULTILINE)
    (folder / "token").write_text(secret + "\n")
    (folder / "tokens").write_text(line + "\n")


class Deployment:
    def __init__(self, network, folder, mtls):
        self.network, self.folder, self.mtls = network, folder, mtls
        self.processes = {}
        self.coordinator = f"{'https' if mtls else 'http'}://{network.address('c')}:7070"

    def security(self, host):
        if not self.mtls:
            return ["--insecure"]
        own = ["--tls-cert", self.folder / f"{host}.crt", "--tls-key", self.folder / f"{host}.key"]
        return [*own, "--tls-ca", self.folder / "ca.crt"]

    def spawn(self, host, binary, *arguments):
        path = REPOSITORY / "target" / "debug" / binary
        assert path.is_file(), f"{path} is missing; `make test-deploy` builds it"
        security = self.security(host) + (["--tls-client-ca", self.folder / "ca.crt"] if self.mtls else [])
        roots = ["--root", self.folder, "--root", FIXTURES]
        command = ["ip", "netns", "exec", self.network.namespace(host), path, *roots, *security, *arguments]
        with (self.folder / f"{host}.log").open("a") as log:
            self.processes[host] = subprocess.Popen(
                [str(part) for part in command], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def start(self):
        tokens = []
        if self.mtls:
            certificates(self.folder, self.network)
            token(self.folder)
            tokens = ["--tokens", self.folder / "tokens"]
        listen = f"{self.network.address('c')}:7070"
        self.spawn("c", "coordinator", "--listen", listen, "--data-dir", self.folder / "state", *tokens)
        for host in ("w0", "w1", "w2"):
            listen = f"{self.network.address(host)}:7071"
            self.spawn(host, "worker", "--listen", listen, "--coordinator", self.coordinator, "--id", host, "--threads", "1")
        for host in ("w0", "w1", "w2"):
            self.wait_for(lambda host=host: " registered" in (self.folder / f"{host}.log").read_text(), CALL_S, host)

    def espalier(self, *arguments):
        security = ["--tls-ca", self.folder / "ca.crt", "--token-file", self.folder / "token"] if self.mtls else []
        path = REPOSITORY / "target" / "debug" / "espalier"
        done = run("ip", "netns", "exec", self.network.namespace("c"), path, *arguments, "--coordinator", self.coordinator, *security)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def create(self, out):
        spec = {
            "model": str(FIXTURES / "models" / "gqa"),
            "data": [{"path": str(FIXTURES / "text" / "tiny.txt")}],
            "workers": 2,
            "recipe": {
                "steps": STEPS,
                "batch": {"window_tokens": 64, "rows": 4, "micro_batches": 2},
                "pruning": {"ramp": {"warmup": 0.1, "cooldown": 0.3, "every": 50}},
            },
            "durability": {"checkpoint_every_steps": 20},
            "export": {"path": str(self.folder / out)},
        }
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(spec))
        return re.search(r"run-[0-9a-f]{12}", self.espalier("create", "--file", path))[0]

    def shown(self, run_id, row):
        found = re.search(rf"│ {row} +(\w+)", self.espalier("get", run_id))
        return found[1] if found else ""

    def wait_for(self, ready, patience, what):
        give_up = time.monotonic() + patience
        while time.monotonic() < give_up:
            if ready():
                return
            time.sleep(0.2)
        logs = "\n".join(f"--- {host}\n{(self.folder / f'{host}.log').read_text()[-1500:]}" for host in HOSTS)
        raise AssertionError(f"{what} did not come about within {patience} s\n{logs}")

    def succeeded(self, run_id):
        def ended():
            state = self.shown(run_id, "state")
            assert state not in ("failed", "cancelled"), self.espalier("get", run_id)
            return state == "succeeded"

        self.wait_for(ended, PATIENCE_S, f"the end of {run_id}")

    def stop(self):
        end(self.processes.values())


def digest(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(("mtls", "broken"), [(True, "host"), (False, "link")], ids=["mtls-host-cut-off", "plain-two-workers-parted"])
def test_a_run_survives_half_a_minute_without_a_link(network, tmp_path, mtls, broken):
    deployment = Deployment(network, tmp_path, mtls)
    try:
        deployment.start()
        undisturbed = deployment.create("undisturbed")
        deployment.succeeded(undisturbed)
        disturbed = deployment.create("disturbed")
        deployment.wait_for(lambda: int(deployment.shown(disturbed, "steps done") or 0) > 40, CALL_S, "40 steps")
        cut = time.monotonic()
        try:
            network.cut_off("w1") if broken == "host" else network.part("w0", "w1")
            time.sleep(max(0.0, cut + CUT_S - time.monotonic()))
        finally:
            network.join_again("w1") if broken == "host" else network.unite("w0", "w1")
        deployment.succeeded(disturbed)
        assert int(deployment.shown(disturbed, "restarts") or 0) >= 1
        assert digest(tmp_path / "disturbed") == digest(tmp_path / "undisturbed")
        # The one that was cut off is back.
        deployment.wait_for(lambda: len(re.findall(r"│ w\d ", deployment.espalier("workers"))) == 3, CALL_S, "three workers")
    finally:
        deployment.stop()
