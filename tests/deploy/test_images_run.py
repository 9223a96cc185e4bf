"""The images really built, and a pruning run in pods of them as the chart renders them: restarted on the way, each in its turn."""

import copy
import dataclasses
import ipaddress
import json
import re
import shutil
import threading
import time

import pytest
import yaml
from chart_objects import of_kind, owners, template, the_container
from chart_values import PLAIN
from conftest import REPOSITORY, run, tool
from deployment import CALL_S, FIXTURES, package, wait_for  # noqa: F401
from images import BASE, DOCKER, Containers

pytestmark = pytest.mark.host

NETWORK = "espalier"
RUN_S = 300
STEPS = 60
# Two cores do for two workers.
VALUES = {**PLAIN, "workerDefaults": {"threads": 1}}


@pytest.fixture(scope="session")
def containers():
    made = Containers.begin()
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
    paths, bill = containers.files(name)
    assert config["Labels"]["espalier.sbom"] in paths
    assert "/usr/share/doc/espalier/LICENSE" in paths
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

    @property
    def container(self):
        return f"{self.name}-{the_container(self.spec)['name']}"


class Cluster:
    """As much of a kubelet as the chart's pods need: names, claims, what becomes of $(NAME), and probes, which the test asks."""

    def __init__(self, containers, objects, folder):
        self.containers, self.folder = containers, folder
        # Of the subnets that are free.
        containers.call("podman", "network", "create", "--disable-dns", NETWORK)
        (network,) = json.loads(containers.call("podman", "network", "inspect", NETWORK).stdout)
        _, self.spare, *addresses = ipaddress.ip_network(network["subnets"][0]["subnet"]).hosts()
        self.pods, self.names = {}, {}
        (namespace,) = {found for pod in owners(objects) for found in re.findall(r"\.([\w-]+)\.svc\.", json.dumps(template(pod)))}
        services = {each["metadata"]["name"]: each for each in of_kind(objects, "Service")}
        for owner in owners(objects):
            for number in range(owner["spec"]["replicas"]):
                name, address = f"{owner['metadata']['name']}-{number}", str(addresses.pop())
                self.pods[name] = Pod(name, template(owner)["spec"], address)
                for service in {owner["spec"]["serviceName"], *services} & set(services):
                    selector = services[service]["spec"]["selector"].items()
                    if selector <= template(owner)["metadata"]["labels"].items():
                        self.names.setdefault(address, []).extend(
                            [f"{name}.{service}.{namespace}.svc.cluster.local", f"{service}.{namespace}.svc.cluster.local"]
                        )
        # Each claim is a volume; models and text are put in beforehand.
        volumes = [volume for pod in self.pods.values() for volume in pod.spec["volumes"]]
        for claim in {volume["persistentVolumeClaim"]["claimName"] for volume in volumes if "persistentVolumeClaim" in volume}:
            containers.call("podman", "volume", "create", claim)
        self.fill("models", FIXTURES / "models" / "gqa")
        self.fill("data", FIXTURES / "text" / "tiny.txt")

    def fill(self, volume, source):
        place = self.containers.call("podman", "volume", "inspect", "--format", "{{.Mountpoint}}", f"trial-espalier-{volume}").stdout.strip()
        shutil.copytree(source, f"{place}/{source.name}") if source.is_dir() else shutil.copy(source, place)

    def document(self, pod):
        """The pod as it is rendered, but for what a kubelet does and podman does not."""
        spec = copy.deepcopy(pod.spec)
        container = the_container(spec)
        container["image"] = f"localhost/{container['image']}"
        # Podman would publish the ports on this machine; the test asks the probes.
        for left_out in ("livenessProbe", "readinessProbe", "startupProbe", "ports"):
            container.pop(left_out, None)
        environment = {each["name"]: each.get("value", pod.name) for each in container.get("env", [])}
        container["args"] = [re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], each) for each in container["args"]]
        container["env"] = [{"name": name, "value": value} for name, value in environment.items()]
        spec["hostAliases"] = [{"ip": address, "hostnames": names} for address, names in self.names.items()]
        # Of a StatefulSet's own claims.
        claimed = {mount["name"] for mount in container["volumeMounts"]} - {volume["name"] for volume in spec["volumes"]}
        spec["volumes"] += [{"name": name, "persistentVolumeClaim": {"claimName": f"{name}-{pod.name}"}} for name in claimed]
        del spec["serviceAccountName"]
        return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": pod.name, "labels": {"app": pod.name}}, "spec": spec}

    def start(self, pod):
        path = self.folder / f"{pod.name}.yaml"
        path.write_text(yaml.safe_dump(self.document(pod)))
        # The same hardware address every time, or its peers go on sending to the one that is gone for half a minute.
        hardware = f"02:00:{ipaddress.ip_address(pod.address).packed.hex(':')}"
        self.containers.call("podman", "play", "kube", "--network", NETWORK, "--ip", pod.address, "--mac-address", hardware, path)

    def stop(self, pod):
        """As a pod is ended: SIGTERM, then the grace period, which must do."""
        grace = pod.spec["terminationGracePeriodSeconds"]
        started = time.monotonic()
        self.containers.call("podman", "stop", "--time", grace, pod.container, seconds=grace + CALL_S)
        took = time.monotonic() - started
        status = self.inspect(pod)["State"]["ExitCode"]
        assert status == 0 and took < grace, f"{pod.name} ended with {status} after {took:.0f} s:\n{self.log(pod)}"
        self.containers.call("podman", "pod", "rm", "--force", pod.name)

    def inspect(self, pod):
        (found,) = json.loads(self.containers.call("podman", "inspect", pod.container).stdout)
        return found

    def log(self, pod):
        done = self.containers.call("podman", "logs", "--tail", "50", pod.container, check=False)
        return done.stdout + done.stderr

    def ready(self, pod):
        """By the pod's own readiness probe."""
        probe = the_container(pod.spec)["readinessProbe"]
        request = json.dumps({"service": probe["grpc"]["service"]})
        address = f"{pod.address}:{probe['grpc']['port']}"
        command = ("-plaintext", "-max-time", probe["timeoutSeconds"], "-d", request, address, "grpc.health.v1.Health/Check")
        return '"SERVING"' in run(tool("grpcurl"), *command).stdout

    def wait_until_ready(self, *pods):
        for pod in pods:
            try:
                wait_for(lambda pod=pod: self.ready(pod), f"{pod.name} ready")
            except AssertionError as error:
                raise AssertionError(self.log(pod)) from error

    def close(self):
        for words in ("kill --all", "pod rm --all --force", "volume rm --all --force", f"network rm --force {NETWORK}"):
            self.containers.call("podman", *words.split(), check=False)


@pytest.fixture(scope="module")
def cluster(containers, render, tmp_path_factory):
    made = Cluster(containers, render(VALUES), tmp_path_factory.mktemp("cluster"))
    try:
        for pod in made.pods.values():
            made.start(pod)
        made.wait_until_ready(*made.pods.values())
        yield made
    finally:
        made.close()


def test_pods_are_confined_as_the_chart_says(cluster):
    for pod in cluster.pods.values():
        found, container = cluster.inspect(pod), the_container(pod.spec)
        user, given, limits = pod.spec["securityContext"], found["HostConfig"], container["resources"]["limits"]
        assert found["Config"]["User"] == f"{user['runAsUser']}:{user['runAsGroup']}"
        assert given["ReadonlyRootfs"] and not found["EffectiveCaps"] and given["SecurityOpt"] == ["no-new-privileges"]
        assert limits == {"cpu": str(given["NanoCpus"] // 10**9), "memory": f"{given['Memory'] >> 30}Gi"}
        writable = {mount["Destination"]: mount["RW"] for mount in found["Mounts"]}
        assert writable == {mount["mountPath"]: not mount.get("readOnly", False) for mount in container["volumeMounts"]}
        assert found["Args"] == the_container(cluster.document(pod)["spec"])["args"]


def test_the_pod_of_helm_test_sees_both_workers(cluster, render):
    (hook,) = of_kind(render(VALUES), "Pod")
    pod = Pod(hook["metadata"]["name"], hook["spec"], cluster.spare)
    cluster.start(pod)
    assert cluster.containers.call("podman", "wait", pod.container).stdout == "0\n", cluster.log(pod)
    assert cluster.log(pod).count("idle") == 2, cluster.log(pod)


def spec(out):
    from espalier.v1 import data_pb2, recipe_pb2
    from espalier.v1 import run_service_pb2 as pb

    batch = recipe_pb2.Batch(window_tokens=64, rows=4, micro_batches=4)
    return pb.RunSpec(
        model="/models/gqa",
        training_data=[data_pb2.TextSource(path="/data/tiny.txt")],
        recipe=recipe_pb2.Recipe(steps=STEPS, batch=batch, pruning=recipe_pb2.Pruning(sparsity=0.5)),
        tp_degree=2,
        durability=pb.DurabilitySpec(checkpoint_every_steps=STEPS),
        export=pb.ExportSpec(path=out, dtype=pb.EXPORT_DTYPE_F32),
    )


def outcome(client, run_id):
    """What a run came to: its masks and the bytes of its weights."""
    from espalier.v1 import run_service_pb2 as pb

    assert client.get(run_id).state == pb.RUN_STATE_SUCCEEDED, client.get(run_id).status_message
    mask = client.stub.GetKeepMask(pb.GetKeepMaskRequest(id=run_id), timeout=CALL_S).keep_mask
    weights = {each.name: each.sha256 for each in client.artifacts(run_id) if each.name.endswith(".safetensors")}
    assert mask.layers and weights
    return list(mask.layers), weights


def test_a_run_in_the_charts_pods_survives_a_restart_of_each_and_ends_as_if_there_had_been_none(cluster, package):  # noqa: F811
    """A rolling restart: what each did until SIGTERM is in a checkpoint within its grace period, so that no step is taken twice."""
    from espalier_client import Client

    (coordinator,), workers = ([pod for pod in cluster.pods.values() if ("-coordinator-" in pod.name) == chosen] for chosen in (True, False))
    assert len(workers) == 2
    with Client(f"{coordinator.address}:7070", patience=CALL_S) as client:
        give_up = threading.Timer(RUN_S, client.close)
        give_up.start()
        try:
            undisturbed = client.create(spec("/out/undisturbed")).id
            losses = {each.step.step: each.step.loss for each in client.watch(undisturbed) if each.WhichOneof("kind") == "step"}
            disturbed = client.create(spec("/out/disturbed")).id
            steps, due = [], [*workers, coordinator]
            for event in client.watch(disturbed):
                if event.WhichOneof("kind") == "step":
                    steps.append((event.step.step, event.step.loss))
                    if due and len(steps) >= 12 * (4 - len(due)):
                        pod = due.pop(0)
                        cluster.stop(pod)
                        cluster.start(pod)
                        cluster.wait_until_ready(pod)
            assert not due
            assert outcome(client, undisturbed) == outcome(client, disturbed)
        finally:
            give_up.cancel()
    assert steps == sorted(losses.items())
