"""The chart: lint, what it renders to, and the values that it must refuse."""

import functools
import json

import kubernetes_validate
import pytest
import yaml
from chart_values import ACCEPTED, REFUSED
from conftest import CHART, helm_template, run, tool

OLDEST, NEWEST = "1.30", kubernetes_validate.latest_version()

# The package reads its 3 MB of definitions anew for each object.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)


def of_kind(objects, kind):
    return [each for each in objects if each["kind"] == kind]


def pods(objects):
    """Name and pod spec of everything that starts pods."""
    return [(each["metadata"]["name"], each["spec"]["template"]["spec"]) for each in of_kind(objects, "StatefulSet")]


def worker_sets(objects):
    return [each for each in of_kind(objects, "StatefulSet") if "espalier/pool" in each["metadata"]["labels"]]


def the_container(pod):
    assert len(pod["containers"]) == 1
    return pod["containers"][0]


def option(container, name):
    """Every value given for a command-line option."""
    arguments = container["args"]
    return [arguments[index + 1] for index, argument in enumerate(arguments) if argument == name]


@pytest.fixture(scope="module", params=ACCEPTED, ids=lambda name: name.replace(" ", "-"))
def objects(request, render):
    return render(ACCEPTED[request.param])


def test_helm_lint_finds_nothing():
    done = run(tool("helm"), "lint", "--strict", CHART)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_object_fits_the_schemas_of_kubernetes(objects, version):
    for each in objects:
        kubernetes_validate.validate(each, version, strict=True)


def test_names_are_unique_and_fit_a_label_of_dns(objects):
    names = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(names) == len(set(names))
    for kind, name in names:
        # Kubernetes appends up to 11 characters to a StatefulSet's name in a label.
        assert len(name) <= (52 if kind == "StatefulSet" else 63), name


def test_pods_meet_the_restricted_security_standard(objects):
    for name, pod in pods(objects):
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True, name
        assert context["runAsUser"] > 0 and context["runAsGroup"] > 0, name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for host in ("hostNetwork", "hostPID", "hostIPC"):
            assert host not in pod, name
        container = the_container(pod)
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name
        for volume in pod["volumes"]:
            assert set(volume) - {"name"} <= {"emptyDir", "persistentVolumeClaim"}, volume


def test_pods_get_no_token_for_the_kubernetes_api(objects):
    for name, pod in pods(objects):
        assert pod["automountServiceAccountToken"] is False, name
    for account in of_kind(objects, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    assert not {"Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"} & {each["kind"] for each in objects}


def test_every_container_has_limits_and_is_probed_by_grpc_on_the_port_it_listens_on(objects):
    for name, pod in pods(objects):
        container = the_container(pod)
        for kind in ("requests", "limits"):
            assert {"cpu", "memory"} <= set(container["resources"][kind]), name
        (port,) = [each["containerPort"] for each in container["ports"] if each["name"] == "grpc"]
        assert option(container, "--listen") == [f"0.0.0.0:{port}"], name
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["grpc"] == {"port": port}, (name, probe)


def test_mounts_and_volumes_match_and_each_shared_folder_is_a_root(objects):
    for name, pod in pods(objects):
        container = the_container(pod)
        claimed = [
            each["metadata"]["name"]
            for owner in of_kind(objects, "StatefulSet")
            if owner["metadata"]["name"] == name
            for each in owner["spec"].get("volumeClaimTemplates", [])
        ]
        volumes = [each["name"] for each in pod["volumes"]] + claimed
        mounts = [each["name"] for each in container["volumeMounts"]]
        assert sorted(volumes) == sorted(mounts), name
        shared = [each["mountPath"] for each in container["volumeMounts"] if each["name"].startswith("shared-")]
        shared = [path for path in shared if path != "/dev/shm"]
        assert option(container, "--root") == shared, name
        # The root file system cannot be written, so the temporary folder must be a volume.
        assert "/tmp" in [each["mountPath"] for each in container["volumeMounts"]], name


def test_claims_that_pods_use_are_made_or_given(objects):
    made = {each["metadata"]["name"] for each in of_kind(objects, "PersistentVolumeClaim")}
    for _, pod in pods(objects):
        for volume in pod["volumes"]:
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            assert claim is None or claim in made or claim.startswith(("team-", "espalier-state")), claim
    for claim in of_kind(objects, "PersistentVolumeClaim"):
        assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_services_and_policies_select_the_pods_that_they_are_named_after(objects):
    sets = of_kind(objects, "StatefulSet")
    labels = {each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"] for each in sets}
    selectors = {
        "Service": lambda spec: spec["selector"],
        "NetworkPolicy": lambda spec: spec["podSelector"]["matchLabels"],
        "PodDisruptionBudget": lambda spec: spec["selector"]["matchLabels"],
    }
    for kind, selector_of in selectors.items():
        for each in of_kind(objects, kind):
            selector = selector_of(each["spec"]).items()
            selected = [name for name, found in labels.items() if selector <= found.items()]
            assert selected == [each["metadata"]["name"]], (kind, each["metadata"]["name"])
    services = {each["metadata"]["name"] for each in of_kind(objects, "Service")}
    for each in sets:
        assert each["spec"]["serviceName"] in services
        assert each["spec"]["selector"]["matchLabels"].items() <= labels[each["metadata"]["name"]].items()


def test_workers_call_the_coordinator_and_advertise_a_name_that_their_headless_service_gives(objects):
    services = {each["metadata"]["name"]: each["spec"] for each in of_kind(objects, "Service")}
    for workers in worker_sets(objects):
        container = the_container(workers["spec"]["template"]["spec"])
        service = workers["spec"]["serviceName"]
        assert services[service]["clusterIP"] == "None"
        assert services[service]["publishNotReadyAddresses"] is True

        (coordinator,) = option(container, "--coordinator")
        host, port = coordinator.removeprefix("http://").rsplit(":", 1)
        name, namespace = host.split(".")[:2]
        assert namespace == "pruning"
        assert int(port) == services[name]["ports"][0]["port"]

        (advertised,) = option(container, "--advertise")
        port = services[service]["ports"][0]["port"]
        assert advertised.startswith(f"http://$(POD_NAME).{service}.pruning.svc.")
        assert advertised.endswith(f":{port}")
        assert container["env"][0] == {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}


def test_the_coordinator_is_alone_and_keeps_its_state_by_default(render):
    (coordinator,) = [
        each for each in of_kind(render({}), "StatefulSet") if each["metadata"]["name"].endswith("-coordinator")
    ]
    assert coordinator["spec"]["replicas"] == 1
    (claim,) = coordinator["spec"]["volumeClaimTemplates"]
    container = the_container(coordinator["spec"]["template"]["spec"])
    (mount,) = [each for each in container["volumeMounts"] if each["name"] == claim["metadata"]["name"]]
    assert option(container, "--data-dir") == [mount["mountPath"]]


def test_a_cuda_pool_asks_one_gpu_for_each_worker_and_a_cpu_pool_none(render):
    pools = {
        each["metadata"]["labels"]["espalier/pool"]: the_container(each["spec"]["template"]["spec"])
        for each in worker_sets(render(ACCEPTED["two pools"]))
    }
    assert pools["gpu"]["resources"]["limits"] == {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": 1}
    assert option(pools["gpu"], "--device") == ["cuda"]
    assert pools["gpu"]["image"].startswith("espalier-worker-cuda@sha256:")
    assert "nvidia.com/gpu" not in json.dumps(pools["cpu"])
    assert option(pools["cpu"], "--device") == ["cpu"]


def test_a_pools_own_image_takes_no_tag_or_digest_from_the_common_one(render):
    common = {"registry": "r.example.com", "worker": {"tag": "1", "digest": "sha256:" + "f" * 64}}
    pools = {"cpu": {}, "gpu": {"image": {"repository": "with-cuda"}}, "next": {"image": {"tag": "2"}}}
    images = {
        each["metadata"]["labels"]["espalier/pool"]: the_container(each["spec"]["template"]["spec"])["image"]
        for each in worker_sets(render({"image": common, "workerPools": pools}))
    }
    assert images == {
        "cpu": "r.example.com/espalier-worker@sha256:" + "f" * 64,
        "gpu": "r.example.com/with-cuda:0.1.0",
        "next": "r.example.com/espalier-worker:2",
    }


def test_only_the_named_reach_each_port(render):
    policies = {each["metadata"]["name"]: each["spec"] for each in of_kind(render({}), "NetworkPolicy")}
    assert sorted(policies) == ["trial-espalier-coordinator", "trial-espalier-worker-cpu"]
    for spec in policies.values():
        assert sorted(spec["policyTypes"]) == ["Egress", "Ingress"]
        assert all("from" in rule and rule["from"] for rule in spec["ingress"])
        assert all("to" in rule and rule["to"] for rule in spec["egress"])
    to_worker = policies["trial-espalier-worker-cpu"]["ingress"]
    components = [rule["from"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for rule in to_worker]
    assert components == ["coordinator", "worker"]


def test_plain_text_is_asked_for_only_where_values_say_so(render):
    for insecure in (True, False):
        for _, pod in pods(render({"insecure": insecure})):
            assert ("--insecure" in the_container(pod)["args"]) is insecure


def test_an_older_kubernetes_is_refused():
    done = helm_template({}, "--kube-version", "1.29.0")
    assert done.returncode != 0 and "1.30" in done.stderr


@pytest.mark.parametrize("case", REFUSED, ids=lambda name: name.replace(" ", "-"))
def test_bad_values_are_refused_by_their_path(case):
    values, named = REFUSED[case]
    done = helm_template(values)
    assert done.returncode != 0
    assert named in done.stderr, done.stderr


def test_the_schema_knows_the_values_and_no_others():
    """Each property of the schema has its default and comment in values.yaml, and each object is closed."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())

    def resolved(node):
        return schema["definitions"][node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node

    def walk(node, values, path):
        node = resolved(node)
        if "properties" not in node:
            return
        assert node["additionalProperties"] is False, path
        known = set(node["properties"]) - {"global"}
        assert known == set(values), f"{path}: {known ^ set(values)}"
        for name in known:
            if values[name]:
                walk(node["properties"][name], values[name], f"{path}.{name}")

    image = defaults["image"]["worker"]
    for name, volume in defaults["volumes"].items():
        (shape,) = schema["properties"]["volumes"]["patternProperties"].values()
        walk(shape, volume, f"volumes.{name}")
    assert set(image) == set(schema["definitions"]["image"]["properties"])
    walk(schema, defaults, "values")
