"""What the chart lets pods be, who reaches whom, and how secrets get there."""

import pytest
import yaml
from chart_objects import all_pods, of_kind, option, owners, pods, template, the_container, worker_sets
from chart_values import ACCEPTED, MANAGED_TLS, PLAIN
from conftest import CHART, helm_template
from helm_python import Chart


@pytest.fixture(scope="module", params=ACCEPTED, ids=lambda name: name.replace(" ", "-"))
def objects(request, render):
    return render(ACCEPTED[request.param])


def test_pods_meet_the_restricted_security_standard(objects):
    for name, pod in all_pods(objects):
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
            assert set(volume) - {"name"} <= {"emptyDir", "persistentVolumeClaim", "secret"}, volume
        for init in pod.get("initContainers", []):
            assert init["securityContext"] == container["securityContext"], name
        for each in [container, *pod.get("initContainers", [])]:
            for kind in ("requests", "limits"):
                assert {"cpu", "memory"} <= set(each["resources"][kind]), (name, each["name"])


def test_pods_get_no_token_for_the_kubernetes_api(objects):
    for name, pod in all_pods(objects):
        assert pod["automountServiceAccountToken"] is False, name
    for account in of_kind(objects, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    assert not {"Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"} & {each["kind"] for each in objects}


def test_services_and_policies_select_the_pods_that_they_are_named_after(objects):
    sets = owners(objects)
    labels = {each["metadata"]["name"]: template(each)["metadata"]["labels"] for each in sets}
    labels |= {each["metadata"]["name"]: each["metadata"]["labels"] for each in of_kind(objects, "Pod")}
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
    for each in of_kind(objects, "StatefulSet"):
        assert each["spec"]["serviceName"] in services
        assert each["spec"]["selector"]["matchLabels"].items() <= labels[each["metadata"]["name"]].items()


def test_only_the_named_reach_each_port(render):
    policies = {each["metadata"]["name"]: each["spec"] for each in of_kind(render(PLAIN), "NetworkPolicy")}
    assert sorted(policies) == ["trial-espalier-coordinator", "trial-espalier-test", "trial-espalier-worker-cpu"]
    for spec in policies.values():
        assert sorted(spec["policyTypes"]) == ["Egress", "Ingress"]
        assert all("from" in rule and rule["from"] for rule in spec["ingress"])
        for rule in spec["ingress"]:
            # Whoever watches reads metrics, and reaches nothing else.
            if rule["from"] == [{"namespaceSelector": {}}]:
                assert [port["port"] for port in rule["ports"]] == ["metrics"]
        assert all("to" in rule and rule["to"] for rule in spec["egress"])
    to_worker = policies["trial-espalier-worker-cpu"]["ingress"]
    from_pods = [rule["from"][0]["podSelector"]["matchLabels"] for rule in to_worker if "podSelector" in rule["from"][0]]
    components = [labels["app.kubernetes.io/component"] for labels in from_pods]
    assert components == ["coordinator", "worker"]


def test_every_pod_has_a_policy(objects):
    policies = {each["metadata"]["name"] for each in of_kind(objects, "NetworkPolicy")}
    if policies:
        assert policies == {name for name, _ in all_pods(objects)}


def outside(policy):
    """Ports that pods reach at the services named by networkPolicy.services."""
    services = yaml.safe_load((CHART / "values.yaml").read_text())["networkPolicy"]["services"]
    rules = [rule for rule in policy["egress"] if rule["to"] == services]
    return [each["port"] for rule in rules for each in rule["ports"]]


@pytest.mark.parametrize(
    ("values", "coordinator", "worker"),
    [
        ({}, [], []),
        ({"postgres": {"secret": "pg"}}, [5432], []),
        ({"objectStore": {"roots": ["s3://runs"]}}, [443], [443]),
        ({"objectStore": {"roots": ["s3://runs"], "endpoint": "http://minio.storage:9000"}}, [9000], [9000]),
        ({"objectStore": {"roots": ["s3://runs"], "endpoint": "http://minio"}}, [80], [80]),
        ({"telemetry": {"otlpEndpoint": "http://collector:4317"}}, [4317], [4317]),
        ({"volumes": {"models": {"download": {"image": "x", "command": ["fetch"]}}}}, [443], [443]),
        (
            {
                "postgres": {"secret": "pg"},
                "networkPolicy": {"postgresPort": 6432},
                "objectStore": {"roots": ["s3://runs"]},
                "telemetry": {"otlpEndpoint": "https://collector.example.com"},
            },
            [6432, 443],
            [443],
        ),
    ],
)
def test_pods_reach_the_services_that_they_were_told_of_and_no_others(render, values, coordinator, worker):
    policies = {each["metadata"]["name"]: each["spec"] for each in of_kind(render({**PLAIN, **values}), "NetworkPolicy")}
    assert outside(policies["trial-espalier-coordinator"]) == coordinator
    assert outside(policies["trial-espalier-worker-cpu"]) == worker


def test_workers_reach_those_of_their_own_pool_and_no_others(render):
    objects = render(ACCEPTED["one pool for each model size"])
    labels = [template(each)["metadata"]["labels"] for each in worker_sets(objects)]
    policies = [each["spec"] for each in of_kind(objects, "NetworkPolicy") if "-worker-" in each["metadata"]["name"]]
    assert len(labels) == len(policies) == 3
    for policy in policies:
        for rules, peers in ((policy["ingress"], "from"), (policy["egress"], "to")):
            open_ones = [rule[peers][0]["podSelector"]["matchLabels"] for rule in rules if "ports" not in rule]
            own = policy["podSelector"]["matchLabels"]["espalier/pool"]
            reached = [each["espalier/pool"] for each in labels if any(selector.items() <= each.items() for selector in open_ones)]
            assert reached == [own]


def test_plain_text_is_asked_for_only_where_values_say_so(render):
    for values, insecure in ((PLAIN, True), ({"tls": MANAGED_TLS, "tokensSecret": "t"}, False)):
        for _, pod in pods(render(values)):
            assert ("--insecure" in the_container(pod)["args"]) is insecure
            assert ("--tls-cert" in the_container(pod)["args"]) is not insecure
    done = helm_template({})
    assert done.returncode != 0 and "insecure" in done.stderr and "tls.enabled" in done.stderr


def test_with_tls_nothing_is_plain_and_both_certificates_name_their_pods(render):
    rendered = render(ACCEPTED["everything at once"])
    certificates = {each["metadata"]["name"]: each["spec"] for each in of_kind(rendered, "Certificate")}
    assert sorted(certificates) == ["trial-espalier-coordinator", "trial-espalier-worker"]
    assert "espalier-coordinator" in certificates["trial-espalier-coordinator"]["dnsNames"]
    assert "espalier-worker" in certificates["trial-espalier-worker"]["dnsNames"]
    assert "espalier-worker" not in certificates["trial-espalier-coordinator"]["dnsNames"]
    for workers in worker_sets(rendered):
        (advertised,) = option(the_container(template(workers)["spec"]), "--advertise")
        host = advertised.removeprefix("https://$(POD_NAME).").rsplit(":", 1)[0]
        assert f"*.{host}" in certificates["trial-espalier-worker"]["dnsNames"]
    for name, pod in pods(rendered):
        container = the_container(pod)
        assert "--insecure" not in container["args"], name
        for flag in ("--tls-cert", "--tls-key", "--tls-client-ca", "--tls-ca"):
            (path,) = option(container, flag)
            assert path.startswith("/etc/espalier/tls/"), name
        (volume,) = [each for each in pod["volumes"] if each["name"] == "tls"]
        component = "worker" if container["name"] == "worker" else "coordinator"
        assert volume["secret"]["secretName"] == certificates[f"trial-espalier-{component}"]["secretName"]


def test_secrets_reach_the_processes_as_files_or_variables_and_are_never_in_the_chart(render):
    (coordinator,) = [
        template(each)["spec"]
        for each in owners(render(ACCEPTED["everything at once"]))
        if each["metadata"]["name"].endswith("-coordinator")
    ]
    container = the_container(coordinator)
    assert option(container, "--tokens") == ["/etc/espalier/tokens/tokens"]
    variables = {each["name"]: each for each in container["env"]}
    assert variables["ESPALIER_STORE"]["valueFrom"] == {"secretKeyRef": {"name": "pg", "key": "url"}}
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert variables[name]["valueFrom"] == {"secretKeyRef": {"name": "s3", "key": name}}
    assert option(container, "--checkpoint-dir") == ["s3://runs/team/checkpoints"]
    assert not of_kind(render(ACCEPTED["everything at once"]), "Secret")


def test_the_hook_of_helm_test_asks_the_coordinator_for_its_workers(objects):
    hooks = of_kind(objects, "Pod")
    (coordinator,) = [the_container(pod) for _, pod in pods(objects) if the_container(pod)["name"] == "coordinator"]
    tokens, plain = option(coordinator, "--tokens"), "--insecure" in coordinator["args"]
    if not hooks:
        # A token is asked for, and none is given.
        assert tokens
        return
    (hook,) = hooks
    assert hook["metadata"]["annotations"]["helm.sh/hook"] == "test"
    container = the_container(hook["spec"])
    assert container["command"] == ["/usr/local/bin/espalier"] and container["args"][0] == "workers"
    (service,) = [each for each in of_kind(objects, "Service") if each["metadata"]["name"].endswith("-coordinator")]
    assert service["metadata"]["name"] in option(container, "--coordinator")[0]
    assert bool(option(container, "--token-file")) is bool(tokens)
    assert bool(option(container, "--tls-ca")) is not plain
    # The command line sends no token in plain text unless told so.
    assert ("--insecure" in container["args"]) is (plain and bool(tokens))
    mounted = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert sorted(mounted) == sorted(each["name"] for each in hook["spec"]["volumes"])
    for flag in ("--token-file", "--tls-ca"):
        for path in option(container, flag):
            assert path.rsplit("/", 1)[0] in mounted.values(), flag


def test_the_notes_name_the_commands_to_run_next():
    def notes(values):
        with Chart.load(str(CHART)) as chart:
            rendered = chart.render(values, name="trial", namespace="pruning")
        (text,) = [text for name, text in rendered.items() if name.endswith("/NOTES.txt")]
        return text

    text = notes(PLAIN)
    for command in (
        "kubectl --namespace pruning get pods -l app.kubernetes.io/instance=trial --watch",
        "kubectl --namespace pruning port-forward service/trial-espalier-coordinator 7070",
        "espalier workers --coordinator http://127.0.0.1:7070",
        "helm test trial --namespace pruning",
    ):
        assert command in text
    assert "in plain text" in text and "/models" in text
    text = notes({"tls": MANAGED_TLS, "tokensSecret": "t", "coordinator": {"port": 8070}})
    assert "get secret trial-espalier-coordinator-tls" in text
    assert "espalier workers --coordinator https://localhost:8070 --tls-ca ca.crt" in text
    # Nobody gave a token for it.
    assert "helm test" not in text and "in plain text" not in text
