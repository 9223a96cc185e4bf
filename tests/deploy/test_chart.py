"""The chart: lint, what it renders to, and the values that it must refuse."""

import copy
import functools
import json
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from chart_objects import of_kind, option, owners, pods, template, the_container, worker_sets
from chart_values import ACCEPTED, PLAIN, REFUSED
from conftest import CHART, helm_template, run, tool
from helm_python import Chart

import chart_readme  # of scripts/, which conftest puts on the path

VERSIONS = [f"1.{minor}" for minor in range(30, 38)]
# Kinds that Kubernetes does not know. schemas/ says what their specs may be, and no more than the chart needs.
OTHERS = {
    "LeaderWorkerSet": "leaderworkerset.x-k8s.io/v1",
    "PodGroup": "scheduling.volcano.sh/v1beta1",
    "Certificate": "cert-manager.io/v1",
    "ServiceMonitor": "monitoring.coreos.com/v1",
    "PrometheusRule": "monitoring.coreos.com/v1",
}
SPECS = {kind: yaml.safe_load((Path(__file__).parent / "schemas" / f"{kind}.yaml").read_text()) for kind in OTHERS}

# The package reads its 3 MB of definitions anew for each object.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)


@pytest.fixture(scope="module", params=ACCEPTED, ids=lambda name: name.replace(" ", "-"))
def objects(request, render):
    return render(ACCEPTED[request.param])


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda name: name.replace(" ", "-"))
def test_helm_lint_finds_nothing(case, tmp_path):
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump(ACCEPTED[case]))
    done = run(tool("helm"), "lint", "--strict", "--values", values, CHART)
    assert done.returncode == 0, done.stdout + done.stderr
    # A template that fails is only told of.
    assert "Fail:" not in done.stdout + done.stderr


def validate_other(each):
    """Against the schema of its kind, which is not one of Kubernetes'."""
    assert set(each) == {"apiVersion", "kind", "metadata", "spec"}
    assert each["apiVersion"] == OTHERS[each["kind"]]
    jsonschema.validate(each["spec"], SPECS[each["kind"]], jsonschema.Draft202012Validator)


def validate(objects, version):
    """Against Kubernetes' own schemas; of others' kinds, their metadata and the pods that they make."""
    for each in objects:
        if each["kind"] in OTHERS:
            validate_other(each)
            each = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": each["metadata"]}
        kubernetes_validate.validate(each, version, strict=True)
    for owner in of_kind(objects, "LeaderWorkerSet"):
        made = template(owner)
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **made["metadata"]}, "spec": made["spec"]}
        kubernetes_validate.validate(pod, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_fits_the_schemas_of_kubernetes(objects, version):
    validate(objects, version)


def test_the_schemas_of_others_refuse_what_their_kinds_do_not_have(render):
    cases = ("everything at once", "GPUs in groups that live and die together")
    known = {each["kind"]: each for case in cases for each in render(ACCEPTED[case]) if each["kind"] in OTHERS}
    assert set(known) == set(OTHERS)
    wrong = [
        ("LeaderWorkerSet", ["leaderWorkerTemplate", "restartPolicy"], None),
        ("LeaderWorkerSet", ["networkConfig", "subdomainPolicy"], "shared"),
        ("PodGroup", ["minMember"], "4"),
        ("Certificate", ["renewBefore"], "30d"),
        ("Certificate", ["issuerRef"], {"kind": "Issuer"}),
        ("Certificate", ["usages", 0], "server_auth"),
        ("ServiceMonitor", ["endpoints", 0, "port"], 9464),
        ("ServiceMonitor", ["endpoints", 0, "interval"], "5s1m"),
        ("PrometheusRule", ["groups", 0, "rules", 0, "for"], 120),
        *((kind, ["unknown"], "x") for kind in OTHERS),
    ]
    for kind, path, value in wrong:
        each = copy.deepcopy(known[kind])
        validate_other(each)
        inner = each["spec"]
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = value
        with pytest.raises(jsonschema.ValidationError):
            validate_other(each)


def test_what_is_rendered_does_not_depend_on_the_version_of_kubernetes(render):
    for case in ("everything at once", "GPUs in groups that live and die together"):
        rendered = [render(ACCEPTED[case], "--kube-version", f"{version}.0") for version in VERSIONS]
        assert all(each == rendered[0] for each in rendered), case


def test_the_newest_version_that_is_known_is_tried():
    assert ".".join(kubernetes_validate.latest_version().split(".")[:2]) == VERSIONS[-1]


def test_names_are_unique_and_fit_a_label_of_dns(objects):
    names = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(names) == len(set(names))
    for kind, name in names:
        # Kubernetes appends up to 11 characters to a StatefulSet's name in a label.
        assert len(name) <= (52 if kind == "StatefulSet" else 63), name


def test_every_process_is_probed_by_grpc_on_the_port_it_listens_on(objects):
    for name, pod in pods(objects):
        container = the_container(pod)
        (port,) = [each["containerPort"] for each in container["ports"] if each["name"] == "grpc"]
        assert option(container, "--listen") == [f"0.0.0.0:{port}"], name
        service = "espalier.v1.WorkerService" if container["name"] == "worker" else "espalier.v1.RunService"
        expected = {
            "startupProbe": {"grpc": {"port": port}},
            "livenessProbe": {"grpc": {"port": port}},
            # Ready for work, not only alive.
            "readinessProbe": {"grpc": {"port": port, "service": service}},
        }
        if option(container, "--tls-cert"):
            # The kubelet speaks no gRPC over TLS.
            alive = {"httpGet": {"port": "metrics", "path": "/healthz"}}
            ready = {"httpGet": {"port": "metrics", "path": "/readyz"}}
            expected = {"startupProbe": alive, "livenessProbe": alive, "readinessProbe": ready}
            (metrics,) = [each["containerPort"] for each in container["ports"] if each["name"] == "metrics"]
            assert option(container, "--metrics-listen") == [f"0.0.0.0:{metrics}"], name
        for probe, asks in expected.items():
            assert asks.items() <= container[probe].items(), (name, probe)


def test_mounts_and_volumes_match_and_each_shared_folder_is_a_root(objects):
    for name, pod in pods(objects):
        container = the_container(pod)
        claimed = [
            each["metadata"]["name"]
            for owner in owners(objects)
            if owner["metadata"]["name"] == name
            for each in owner["spec"].get("volumeClaimTemplates", [])
        ]
        volumes = [each["name"] for each in pod["volumes"]] + claimed
        mounts = [each["name"] for each in container["volumeMounts"]]
        assert sorted(volumes) == sorted(mounts), name
        shared = [each["mountPath"] for each in container["volumeMounts"] if each["name"].startswith("shared-")]
        shared = [path for path in shared if path != "/dev/shm"]
        assert [root for root in option(container, "--root") if not root.startswith("s3://")] == shared, name
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


def test_workers_call_the_coordinator_and_advertise_a_name_that_their_headless_service_gives(objects):
    services = {each["metadata"]["name"]: each["spec"] for each in of_kind(objects, "Service")}
    for workers in worker_sets(objects):
        container = the_container(template(workers)["spec"])
        # A LeaderWorkerSet names its pods' subdomain after itself.
        service = workers["spec"].get("serviceName", workers["metadata"]["name"])
        scheme = "https" if option(container, "--tls-cert") else "http"
        assert services[service]["clusterIP"] == "None"
        assert services[service]["publishNotReadyAddresses"] is True

        (coordinator,) = option(container, "--coordinator")
        host, port = coordinator.removeprefix(f"{scheme}://").rsplit(":", 1)
        name, namespace = host.split(".")[:2]
        assert namespace == "pruning"
        assert int(port) == services[name]["ports"][0]["port"]

        (advertised,) = option(container, "--advertise")
        port = services[service]["ports"][0]["port"]
        assert advertised.startswith(f"{scheme}://$(POD_NAME).{service}.pruning.svc.")
        assert advertised.endswith(f":{port}")
        assert container["env"][0] == {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}


def test_the_coordinator_is_alone_and_keeps_its_state_by_default(render):
    (coordinator,) = [
        each for each in of_kind(render(PLAIN), "StatefulSet") if each["metadata"]["name"].endswith("-coordinator")
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
        for each in worker_sets(render({**PLAIN, "image": common, "workerPools": pools}))
    }
    assert images == {
        "cpu": "r.example.com/espalier-worker@sha256:" + "f" * 64,
        "gpu": "r.example.com/with-cuda:0.1.0",
        "next": "r.example.com/espalier-worker:2",
    }


def test_gangs_are_asked_for_as_each_scheduler_has_it(render):
    def pool(kind):
        objects = render({**PLAIN, "workerPools": {"cpu": {"replicas": 4, "gang": {"type": kind, "queue": "team"}}}})
        (workers,) = worker_sets(objects)
        return objects, workers

    objects, workers = pool("kueue")
    assert workers["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    objects, workers = pool("volcano")
    (group,) = of_kind(objects, "PodGroup")
    assert group["spec"] == {"minMember": 4, "queue": "team"}
    assert template(workers)["metadata"]["annotations"]["scheduling.k8s.io/group-name"] == group["metadata"]["name"]
    assert template(workers)["spec"]["schedulerName"] == "volcano"
    objects, workers = pool("leaderWorkerSet")
    assert workers["kind"] == "LeaderWorkerSet" and workers["spec"]["leaderWorkerTemplate"]["size"] == 4
    objects, workers = pool("")
    assert workers["kind"] == "StatefulSet" and "schedulerName" not in template(workers)["spec"]


def test_a_worker_has_time_for_its_checkpoint(objects):
    for workers in worker_sets(objects):
        pod = template(workers)["spec"]
        (drain,) = option(the_container(pod), "--drain-seconds")
        assert int(drain) < pod["terminationGracePeriodSeconds"]


def test_monitors_and_dashboards_are_made_where_asked_for(render):
    rendered = render(ACCEPTED["everything at once"])
    (monitor,) = of_kind(rendered, "ServiceMonitor")
    selector = monitor["spec"]["selector"]["matchLabels"]
    for service in of_kind(rendered, "Service"):
        assert selector.items() <= service["metadata"]["labels"].items()
        assert "metrics" in [port["name"] for port in service["spec"]["ports"]]
    (rule,) = of_kind(rendered, "PrometheusRule")
    assert rule["spec"] == yaml.safe_load((CHART / "alerts" / "espalier.yaml").read_text())
    boards = of_kind(rendered, "ConfigMap")
    assert len(boards) == len(list((CHART / "dashboards").glob("*.json"))) == 2
    for board in boards:
        ((name, text),) = board["data"].items()
        assert json.loads(text) == json.loads((CHART / "dashboards" / name).read_text())
        assert board["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_a_volume_with_a_download_is_filled_before_the_process_starts(render):
    rendered = render(ACCEPTED["models fetched by each pod"])
    assert not [each for each in of_kind(rendered, "PersistentVolumeClaim") if each["metadata"]["name"].endswith("-models")]
    for name, pod in pods(rendered):
        (init,) = pod["initContainers"]
        (volume,) = [each for each in pod["volumes"] if each["name"] == "shared-models"]
        assert volume["emptyDir"] == {"sizeLimit": "50Gi"}, name
        assert {"name": "shared-models", "mountPath": "/models"} in init["volumeMounts"], name


def test_an_older_kubernetes_is_refused():
    done = helm_template(PLAIN, "--kube-version", "1.29.0")
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


def test_helm_3_and_helm_4_render_alike(render):
    with Chart.load(str(CHART)) as chart:
        for case in ACCEPTED:
            rendered = chart.render(ACCEPTED[case], name="trial", namespace="pruning")
            documents = [text for name, text in rendered.items() if not name.endswith((".txt", ".tpl"))]
            by_four = [each for text in documents for each in yaml.safe_load_all(text) if each]
            by_three = render(ACCEPTED[case])

            def key(each):
                return each["kind"], each["metadata"]["name"]

            assert sorted(map(key, by_three)) == sorted(map(key, by_four)), case
            assert sorted(by_three, key=key) == sorted(by_four, key=key), case


def test_the_readme_lists_the_values_as_they_are():
    assert (CHART / "README.md").read_text() == chart_readme.readme(), "run `python3 scripts/chart_readme.py`"
    listed = {name for name, _, _ in chart_readme.rows((CHART / "values.yaml").read_text())}
    assert {"insecure", "tls.certManager.issuerName", "workerDefaults.gang.type", "telemetry.metrics.port"} <= listed
