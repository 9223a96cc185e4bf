"""The images really built, and a pruning run in pods of them as the chart renders them: restarted on the way, each in its turn."""

import copy
import dataclasses
import ipaddress
import json
import re
import shutil
import time

import pytest
import yaml
from chart_objects import of_kind, owners, template, the_container
from chart_values import PLAIN
from conftest import REPOSITORY, run, tool
from deployment import FIXTURES, package, wait_for  # noqa: F401
from images import BASE, DOCKER, Containers

pytestmark = pytest.mark.host

NETWORK = "10.89.77.0/24"
RUN_S = 240
STEPS = 60


@pytest.fixture(scope="session")
def containers():
    made = Containers()
    try:
        made.make_base()
        made.make_build(REPOSITORY / "target" / "debug")
        for image in ("coordinator", "worker"):
            made.build(image)
        yield made
    finally:
        made.close()


@pytest.fixture(scope="session", params=["coordinator", "worker"])
def image(request, containers):
    return request.param, containers


def test_images_hold_what_they_need_and_say_what_they_are(image):
    name, containers = image
    config = containers.inspect(name)["OCIv1"]["config"]
    assert config["User"] == "65532:65532"
    assert config["Labels"]["org.opencontainers.image.title"] == f"espalier-{name}"
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    paths, texts = containers.files(name)
    assert (config["Entrypoint"][0]) in paths
    assert "/usr/share/doc/espalier/LICENSE" in paths
    bill = json.loads(texts[config["Labels"]["espalier.sbom"]])
    assert bill["bomFormat"] == "CycloneDX"
    parts = {each["name"] for each in bill["components"]}
    assert {"tonic", "prost", "tokio", "rustls"} <= parts
    assert ("torch" in parts) == (name == "worker")
    for folder in ("/models", "/data", "/out"):
        assert (paths[folder].st_uid, paths[folder].st_gid) == (65532, 65532)
    # What runs is not its own to change.
    assert paths[config["Entrypoint"][0]].st_uid == 0 and paths[config["Entrypoint"][0]].st_mode & 0o022 == 0


def test_the_coordinators_image_has_no_shell_and_little_else(containers):
    paths, _ = containers.files("coordinator")
    names = {path.rsplit("/", 1)[1] for path in paths}
    assert not names & {"sh", "bash", "dash", "busybox", "apt", "dpkg", "perl", "python3"}
    files = sorted(path for path, status in paths.items() if status.st_mode & 0o170000 == 0o100000)
    assert len(files) < 20, files
    done = containers.call("podman", "run", "--rm", "--read-only", "--cap-drop", "ALL", "localhost/espalier-coordinator:0.1.0", "--version")
    assert done.stdout == "coordinator 0.1.0\n"


def test_all_dockerfiles_begin_with_a_base_that_tests_make_or_with_what_is_built_before():
    bases = {"docker.io/library/rust:1.95-bookworm", BASE, "${BUILD}", "scratch"}
    found = {base for path in DOCKER.glob("*.Dockerfile") for base in re.findall(r"^FROM (\S+)", path.read_text(), re.MULTILINE)}
    assert found == bases


@dataclasses.dataclass
class Pod:
    name: str
    spec: dict
    address: str


class Cluster:
    """As much of a kubelet as the chart's pods need: names, claims, what becomes of $(NAME), and probes, which the test asks."""

    def __init__(self, containers, objects, folder):
        self.containers, self.folder = containers, folder
        containers.call("podman", "network", "create", "--subnet", NETWORK, "espalier")
        addresses = ipaddress.ip_network(NETWORK).hosts()
        next(addresses)
        self.pods, self.names = {}, {}
        (namespace,) = {found for pod in owners(objects) for found in re.findall(r"\.([\w-]+)\.svc\.", json.dumps(template(pod)))}
        services = {each["metadata"]["name"]: each for each in of_kind(objects, "Service")}
        for owner in owners(objects):
            for number in range(owner["spec"]["replicas"]):
                name, address = f"{owner['metadata']['name']}-{number}", str(next(addresses))
                self.pods[name] = Pod(name, template(owner)["spec"], address)
                for service in {owner["spec"]["serviceName"], *services} & set(services):
                    selector = services[service]["spec"]["selector"].items()
                    if selector <= template(owner)["metadata"]["labels"].items():
                        self.names.setdefault(address, []).extend(
                            [f"{name}.{service}.{namespace}.svc.cluster.local", f"{service}.{namespace}.svc.cluster.local"]
                        )
        # Each claim is a volume; models and text are put in beforehand.
        for claim in {volume["persistentVolumeClaim"]["claimName"] for volume in self.volumes() if "persistentVolumeClaim" in volume}:
            containers.call("podman", "volume", "create", claim)
        self.fill("models", FIXTURES / "models" / "gqa")
        self.fill("data", FIXTURES / "text" / "tiny.txt")

    def volumes(self):
        templates = [claim for pod in self.pods.values() for claim in pod.spec.get("volumes", [])]
        return templates

    def place(self, volume):
        done = self.containers.call("podman", "volume", "inspect", "--format", "{{.Mountpoint}}", f"trial-espalier-{volume}")
        return done.stdout.strip()

    def fill(self, volume, source):
        target = f"{self.place(volume)}/{source.name}"
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)

    def document(self, pod):
        """The pod as it is rendered, but for what a kubelet does and podman does not."""
        spec = copy.deepcopy(pod.spec)
        container = the_container(spec)
        container["image"] = f"localhost/{container['image']}"
        for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
            del container[probe]
        # Podman would publish them on this machine.
        del container["ports"]
        environment = {each["name"]: each.get("value", pod.name) for each in container["env"]}
        container["args"] = [re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], each) for each in container["args"]]
        container["env"] = [{"name": name, "value": value} for name, value in environment.items()]
        spec["hostAliases"] = [{"ip": address, "hostnames": names} for address, names in self.names.items()]
        for volume in spec["volumes"]:
            if volume.get("name") == "state" and "persistentVolumeClaim" not in volume:
                volume.pop("emptyDir", None)
        # Of a StatefulSet's own claims.
        claimed = {mount["name"] for mount in container["volumeMounts"]} - {volume["name"] for volume in spec["volumes"]}
        spec["volumes"] += [{"name": name, "persistentVolumeClaim": {"claimName": f"{name}-{pod.name}"}} for name in claimed]
        spec.pop("serviceAccountName", None)
        return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": pod.name, "labels": {"app": pod.name}}, "spec": spec}

    def start(self, name):
        pod = self.pods[name]
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(self.document(pod)))
        self.containers.call("podman", "play", "kube", "--network", "espalier", "--ip", pod.address, path)

    def stop(self, name):
        """As a pod is ended: SIGTERM, then the grace period. Returns the exit status and how long it took."""
        pod = self.pods[name]
        container = f"{name}-{the_container(pod.spec)['name']}"
        started = time.monotonic()
        grace = pod.spec["terminationGracePeriodSeconds"]
        self.containers.call("podman", "stop", "--time", grace, container, seconds=grace + 30)
        took = time.monotonic() - started
        status = int(self.containers.call("podman", "inspect", "--format", "{{.State.ExitCode}}", container).stdout)
        (self.folder / f"{name}.log").open("a").write(self.log(name))
        self.containers.call("podman", "pod", "rm", "--force", name)
        return status, took

    def log(self, name):
        container = f"{name}-{the_container(self.pods[name].spec)['name']}"
        done = self.containers.call("podman", "logs", container, check=False)
        return done.stdout + done.stderr

    def ready(self, name):
        """By the pod's own readiness probe."""
        probe = the_container(self.pods[name].spec)["readinessProbe"]["grpc"]
        request = json.dumps({"service": probe.get("service", "")})
        wait = ("-max-time", str(probe.get("timeoutSeconds", 3)))
        asked = f"{self.pods[name].address}:{probe['port']}"
        done = run(tool("grpcurl"), "-plaintext", *wait, "-d", request, asked, "grpc.health.v1.Health/Check")
        return '"SERVING"' in done.stdout

    def close(self):
        self.containers.call("podman", "pod", "rm", "--all", "--force", check=False)
        self.containers.call("podman", "volume", "rm", "--all", "--force", check=False)
        self.containers.call("podman", "network", "rm", "--force", "espalier", check=False)


@pytest.fixture
def cluster(containers, render, tmp_path):
    made = Cluster(containers, render(PLAIN), tmp_path)
    try:
        for name in made.pods:
            made.start(name)
        for name in made.pods:
            wait_for(lambda name=name: made.ready(name), f"{name} ready:\n{made.log(name)}")
        yield made
    finally:
        made.close()


def spec(out):
    from espalier.v1 import data_pb2, recipe_pb2
    from espalier.v1 import run_service_pb2 as pb

    batch = recipe_pb2.Batch(window_tokens=64, rows=4, micro_batches=4)
    return pb.RunSpec(
        model="/models/gqa",
        training_data=[data_pb2.TextSource(path="/data/tiny.txt")],
        recipe=recipe_pb2.Recipe(steps=STEPS, batch=batch, pruning=recipe_pb2.Pruning(sparsity=0.5)),
        tp_degree=2,
        durability=pb.DurabilitySpec(checkpoint_every_steps=10),
        export=pb.ExportSpec(path=out, dtype=pb.EXPORT_DTYPE_F32),
    )


def test_a_run_in_the_charts_pods_survives_a_restart_of_each_and_ends_as_if_there_had_been_none(cluster, package):  # noqa: F811
    from espalier_client import Client

    coordinator, *workers = sorted(cluster.pods, key=lambda name: "-coordinator-" not in name)
    assert len(workers) == 2
    with Client(f"{cluster.pods[coordinator].address}:7070") as client:
        undisturbed = client.create(spec("/out/undisturbed"))
        client.wait(undisturbed.id)

        run = client.create(spec("/out/disturbed"))
        restarted = []
        until = time.monotonic() + RUN_S
        for event in client.watch(run.id):
            assert time.monotonic() < until, client.get(run.id).status_message
            due = [workers[0], workers[1], coordinator][len(restarted) : len(restarted) + 1]
            if event.WhichOneof("kind") == "step" and due and event.step.step >= 12 * (len(restarted) + 1):
                (name,) = due
                status, took = cluster.stop(name)
                assert status == 0, cluster.log(name) if name in cluster.pods else name
                assert took < cluster.pods[name].spec["terminationGracePeriodSeconds"], f"{name} took {took:.0f} s"
                cluster.start(name)
                wait_for(lambda name=name: cluster.ready(name), f"{name} ready again")
                restarted.append(name)
        assert sorted(restarted) == sorted(cluster.pods)
        assert client.wait(run.id).restarts >= 1
        masks = [list(client.stub.GetKeepMask(_mask(each.id)).keep_mask.layers) for each in (undisturbed, run)]
        assert masks[0] == masks[1]
        exported = [{each.name: each.sha256 for each in client.artifacts(each.id)} for each in (undisturbed, run)]
        weights = [{name: digest for name, digest in files.items() if name.endswith(".safetensors")} for files in exported]
        assert weights[0] and weights[0] == weights[1], "the same bytes"
    # Each had saved what it had done before it went.
    saved = [json.loads(line) for line in cluster.log(coordinator).splitlines() if line.startswith("{")]
    assert saved


def _mask(run_id):
    from espalier.v1 import run_service_pb2 as pb

    return pb.GetKeepMaskRequest(id=run_id)
