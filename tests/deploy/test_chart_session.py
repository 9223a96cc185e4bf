"""The session of docs/kubernetes.md, typed against the processes that the chart starts: its own arguments, on this machine's CPU.

What is changed: addresses are loopback's, volumes and secrets are folders, GPUs are one thread each, and LLaMA 13B is a model of 260 thousand
parameters.
"""

import contextlib
import json
import re
import shlex
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

import yaml
from chart_objects import of_kind, option, owners, template, the_container
from chart_values import MANAGED_TLS, PLAIN
from conftest import CHART, REPOSITORY, run

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
            "cuda": "cpu",
        }
        if advertised:
            replaced[advertised] = f"{advertised.split(':')[0]}://127.0.0.1:{self.ports[pod]}"
        for each in option(container, "--threads"):
            replaced[each] = "1"
        arguments = self.arguments(spec, replaced)
        environment = {each["name"]: each.get("value", pod) for each in container["env"] if not each["name"].startswith("NCCL_")}
        binary = REPOSITORY / "target" / "debug" / container["name"]
        assert binary.is_file(), f"{binary} is missing; `make test-service` builds it"
        with (self.folder / f"{pod}.log").open("w") as log:
            process = subprocess.Popen([binary, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        self.processes.append((pod, process))
        self.grace[pod] = spec["terminationGracePeriodSeconds"]
        self.ready.append(f"http://127.0.0.1:{metrics}/readyz")

    def arguments(self, spec, replaced):
        """A container's, for this machine."""
        container = the_container(spec)
        secrets = {each["name"]: each["secret"]["secretName"] for each in spec["volumes"] if "secret" in each}
        mounts = {each["mountPath"]: f"{self.folder}/secrets/{secrets[each['name']]}" for each in container["volumeMounts"] if each["name"] in secrets}
        for each in option(container, "--coordinator"):
            # By a name that its certificate has.
            replaced[each] = f"{each.split(':')[0]}://localhost:{self.address.split(':')[1]}"

        def here(argument):
            folder, _, name = argument.rpartition("/")
            return f"{mounts[folder]}/{name}" if folder in mounts else self.path(argument)

        return [replaced.get(each, here(each)) for each in container["args"]]

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


def volumes(folder):
    for name in ("models", "data", "out", "var/lib/espalier"):
        (folder / name).mkdir(parents=True)
    shutil.copytree(FIXTURES / "models" / "stories260k", folder / "models" / "llama-13b")
    shutil.copy(FIXTURES / "text" / "tinystories.txt", folder / "data" / "train.txt")
    shutil.copy(FIXTURES / "text" / "held_out.txt", folder / "data" / "test.txt")


@contextlib.contextmanager
def installed(objects, folder):
    installation = Installation(objects, folder)
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


def prune(installation, tmp_path, client):
    """Types the documented commands, with `client` as the environment of the command line."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(small(documented_run(), installation)))
    shutil.copy(installation.folder / "models" / "llama-13b" / "config.json", tmp_path)
    binary = REPOSITORY / "target" / "debug" / "espalier"
    said, name = {}, None
    for words in documented_commands():
        words = [name if word == "RUN" else word for word in words]
        done = subprocess.run(
            [binary, *words],
            cwd=tmp_path,
            env=client,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, (words, done.stdout, done.stderr, installation.log())
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


def test_the_documented_session_prunes_a_model_on_what_the_chart_starts(render, tmp_path):
    values = yaml.safe_load((CHART / "values" / "llama-13b-4-gpus.yaml").read_text())
    cluster = tmp_path / "cluster"
    volumes(cluster)
    with installed(render({**PLAIN, **values}), cluster) as installation:
        prune(installation, tmp_path, {"ESPALIER_COORDINATOR_URL": f"http://{installation.address}"})


def secrets(objects, folder):
    """What cert-manager would issue for the chart's Certificates, by an authority of our own, and two people's tokens."""

    def openssl(*arguments):
        done = run("openssl", *arguments, cwd=folder)
        assert done.returncode == 0, done.stderr

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl("req", "-x509", *curve, "-days", "2", "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=trial")
    for certificate in of_kind(objects, "Certificate"):
        spec = certificate["spec"]
        secret = folder / spec["secretName"]
        secret.mkdir()
        names = [f"DNS:{name}" for name in spec["dnsNames"]]
        if "localhost" not in spec["dnsNames"]:
            # Here workers have no names.
            names.append("IP:127.0.0.1")
        (folder / "san").write_text(f"subjectAltName={','.join(names)}\n")
        openssl("req", *curve, "-keyout", secret / "tls.key", "-out", "own.csr", "-subj", "/")
        signed = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "san")
        openssl("x509", "-req", "-in", "own.csr", *signed, "-out", secret / "tls.crt")
        shutil.copy(folder / "ca.crt", secret)
    lines = []
    for role in ("read", "operate"):
        done = run(REPOSITORY / "target" / "debug" / "espalier", "token", "create", "--name", role, "--role", role)
        assert done.returncode == 0, done.stderr
        (shown,) = re.findall(r"^espalier_\w+$", done.stdout, re.MULTILINE)
        lines += re.findall(rf"^{role} {role} sha256:\w+$", done.stdout, re.MULTILINE)
        (folder / role).mkdir()
        (folder / role / "token").write_text(shown)
    (folder / "tokens").mkdir()
    (folder / "tokens" / "tokens").write_text("\n".join(lines) + "\n")


def test_the_same_with_tls_and_tokens_and_the_pod_of_helm_test(render, tmp_path):
    values = yaml.safe_load((CHART / "values" / "llama-13b-4-gpus.yaml").read_text())
    objects = render({**values, "tls": MANAGED_TLS, "tokensSecret": "tokens", "testTokenSecret": "read"})
    cluster = tmp_path / "cluster"
    volumes(cluster)
    (cluster / "secrets").mkdir()
    secrets(objects, cluster / "secrets")
    with installed(objects, cluster) as installation:
        (hook,) = of_kind(objects, "Pod")
        binary = REPOSITORY / "target" / "debug" / "espalier"
        listed = run(binary, *installation.arguments(hook["spec"], {}))
        assert listed.returncode == 0, listed.stderr
        assert listed.stdout.count("idle") == 4, listed.stdout
        authority, token = cluster / "secrets" / "ca.crt", cluster / "secrets" / "operate" / "token"
        client = {
            "ESPALIER_COORDINATOR_URL": f"https://localhost:{installation.address.split(':')[1]}",
            "ESPALIER_TLS_CA": str(authority),
        }
        stranger = run(binary, "workers", env=client)
        assert stranger.returncode != 0 and "token" in stranger.stderr, stranger.stderr
        prune(installation, tmp_path, {**client, "ESPALIER_TOKEN_FILE": str(token)})
