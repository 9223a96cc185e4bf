"""Logs, traces and metrics of real processes, as a collector (rotel) and Prometheus receive them."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import pytest
import yaml
from conftest import CHART, REPOSITORY, run

sys.path.insert(0, str(REPOSITORY / "scripts"))
import dashboards  # noqa: E402

pytestmark = pytest.mark.host

ROTEL = REPOSITORY / ".cache" / "rotel" / "rotel" / "rotel-agent"
FIXTURES = REPOSITORY / "tests" / "fixtures"
PATIENCE_S = 180
CALL_S = 60
STEPS = 300
# The table of docs/telemetry.md: Prometheus' name and kind.
METRICS = re.findall(
    r"^\| `[a-z_.]+` \| `([a-z_]+)` \| (counter|gauge|histogram) \|",
    (REPOSITORY / "docs" / "telemetry.md").read_text(),
    re.MULTILINE,
)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def on_path(name, package):
    found = shutil.which(name)
    assert found, f"`{name}` is missing: apt-get install {package}"
    return found


class Observed:
    """A coordinator and two workers under the eyes of a collector and of Prometheus."""

    def __init__(self, folder):
        self.folder = folder
        self.processes = {}
        self.ports = {name: free_port() for name in ("collector", "prometheus", "coordinator", "w0", "w1")}

    def spawn(self, name, command, **environment):
        with (self.folder / f"{name}.log").open("a") as log:
            self.processes[name] = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": "/usr/bin:/bin", "OTEL_METRIC_EXPORT_INTERVAL": "1000", "OTEL_BSP_SCHEDULE_DELAY": "500", **environment},
            )

    def start(self):
        assert ROTEL.is_file(), f"{ROTEL} is missing; `make test-deploy` fetches it"
        self.spawn(
            "collector",
            [ROTEL, "start", "--otlp-grpc-endpoint", f"127.0.0.1:{self.ports['collector']}"]
            + ["--otlp-http-endpoint", f"127.0.0.1:{free_port()}", "--exporter", "blackhole"]
            + ["--debug-log", "traces", "--debug-log", "metrics", "--debug-log-verbosity", "detailed"],
        )
        targets = [f"127.0.0.1:{self.ports[name]}" for name in ("coordinator", "w0", "w1")]
        rules = self.folder / "rules.yaml"
        shutil.copy(CHART / "alerts" / "espalier.yaml", rules)
        config = {
            "global": {"scrape_interval": "500ms", "evaluation_interval": "5s"},
            "rule_files": [str(rules)],
            "scrape_configs": [{"job_name": "espalier", "static_configs": [{"targets": targets}]}],
        }
        (self.folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        self.spawn(
            "prometheus",
            [on_path("prometheus", "prometheus"), f"--config.file={self.folder}/prometheus.yaml"]
            + [f"--storage.tsdb.path={self.folder}/tsdb", f"--web.listen-address=127.0.0.1:{self.ports['prometheus']}"],
        )
        self.wait_for("collector", lambda: socket.create_connection(("127.0.0.1", self.ports["collector"]), 1).close() or True)
        self.program("coordinator", "--data-dir", self.folder / "state", "--lease-seconds", "3")
        self.address = self.logged("coordinator", r'"address":"([^"]+)".*coordinator listens|coordinator listens.*"address":"([^"]+)"')
        for name in ("w0", "w1"):
            self.worker(name)

    def worker(self, name):
        before = self.log(name).count('"registered"')
        self.program("worker", "--coordinator", f"http://{self.address}", "--id", name, "--threads", "1", "--peak-flops", "1e12", name=name)
        self.wait_for(name, lambda: self.log(name).count('"registered"') > before)

    def program(self, binary, *arguments, name=None):
        name = name or binary
        path = REPOSITORY / "target" / "debug" / binary
        assert path.is_file(), f"{path} is missing; `make test-deploy` builds it"
        self.spawn(
            name,
            [path, "--listen", "127.0.0.1:0", "--root", self.folder, "--root", FIXTURES, "--log-format", "json"]
            + ["--otlp-endpoint", f"http://127.0.0.1:{self.ports['collector']}"]
            + ["--metrics-listen", f"127.0.0.1:{self.ports[name]}", *arguments],
        )

    def log(self, name):
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, what, ready, patience=CALL_S):
        give_up = time.monotonic() + patience
        while time.monotonic() < give_up:
            try:
                if found := ready():
                    return found
            except OSError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"{what} is not there within {patience} s:\n{self.log(what)[-3000:]}")

    def logged(self, name, pattern):
        found = self.wait_for(name, lambda: re.search(pattern, self.log(name)))
        return next(group for group in found.groups() if group)

    def espalier(self, *arguments):
        done = run(
            REPOSITORY / "target" / "debug" / "espalier",
            *arguments,
            "--coordinator",
            f"http://{self.address}",
            env={"PATH": "/usr/bin:/bin", "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self.ports['collector']}"},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def create(self, recipe):
        text = {"data": [{"path": str(FIXTURES / "text" / "held_out.txt")}], "window_tokens": 64}
        spec = {
            "model": str(FIXTURES / "models" / "gqa"),
            "data": [{"path": str(FIXTURES / "text" / "tiny.txt")}],
            "workers": 2,
            "evaluation": text,
            "durability": {"checkpoint_every_steps": 20},
            "recipe": {"batch": {"window_tokens": 64, "rows": 4, "micro_batches": 2}, **recipe},
        }
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(spec))
        return re.search(r"run-[0-9a-f]{12}", self.espalier("create", "--file", path))[0]

    def state(self, run_id):
        return re.search(r"│ state +(\w+)", self.espalier("get", run_id))[1]

    def query(self, expression, at=None):
        address = f"http://127.0.0.1:{self.ports['prometheus']}/api/v1/query"
        asked = {"query": expression} | ({"time": at} if at else {})
        with urllib.request.urlopen(f"{address}?{urllib.parse.urlencode(asked)}", timeout=CALL_S) as answer:
            return json.load(answer)["data"]["result"]

    def samples(self, metric):
        """Every value of a metric so far, over all of its series."""
        return {float(value) for series in self.query(f"{metric}[30m]") for _, value in series["values"]}

    def stop(self):
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(CALL_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """What is left to look at after a run that lost a worker, and one whose loss was no number."""
    observed = Observed(tmp_path_factory.mktemp("telemetry"))
    try:
        observed.start()
        pruning = {"ramp": {"warmup": 0.1, "cooldown": 0.3, "every": 20}}
        observed.run_id = observed.create({"steps": STEPS, "pruning": pruning})
        step = f'espalier_run_step{{run_id="{observed.run_id}"}} > 60'
        observed.wait_for("prometheus", lambda: observed.query(step), PATIENCE_S)
        # Long enough that rates are there.
        time.sleep(2)
        observed.middle = time.time()
        observed.processes["w1"].terminate()
        observed.processes["w1"].wait(CALL_S)
        waiting = "espalier_queue_runs > 0"
        observed.wait_for("prometheus", lambda: observed.query(waiting), PATIENCE_S)
        observed.worker("w1")
        observed.wait_for("coordinator", lambda: observed.state(observed.run_id) == "succeeded", PATIENCE_S)
        absurd = observed.create({"steps": 8, "learning_rate": {"peak": 1e30}})
        observed.wait_for("coordinator", lambda: observed.state(absurd) in ("failed", "succeeded"), PATIENCE_S)
        # The last values are scraped, and the last spans sent.
        time.sleep(3)
        yield observed
    finally:
        observed.stop()


def test_every_documented_metric_is_there_and_moves(observed):
    assert len(METRICS) > 20
    still = []
    for name, kind in METRICS:
        values = observed.samples(f"{name}_count" if kind == "histogram" else name)
        if len(values) < 2:
            still.append(f"{name}: {values or 'not there'}")
    assert not still, still


def test_no_metric_is_undocumented(observed):
    known = {name + end for name, kind in METRICS for end in (("_count", "_sum", "_bucket") if kind == "histogram" else ("",))}
    names = {series["metric"]["__name__"] for series in observed.query('{job="espalier"}')}
    own = {"target_info", "up"} | {name for name in names if name.startswith(("scrape_", "ALERTS"))}
    assert not names - known - own


def test_queries_of_the_dashboards_find_something(observed):
    empty = []
    for name, text in dashboards.written().items():
        for panel in json.loads(text)["panels"]:
            for target in panel["targets"]:
                expression = target["expr"].replace("$__rate_interval", "10m").replace("$run", ".*")
                # While the run was under way, or at the end.
                if not observed.query(expression, observed.middle) and not observed.query(expression):
                    empty.append(f"{name}: {panel['title']}: {expression}")
    # No call of this run has failed in a way that its panel counts, or it has; both are right.
    assert not [each for each in empty if "Calls that fail" not in each], empty


def test_the_dashboards_are_those_of_the_script():
    for name, text in dashboards.written().items():
        assert (CHART / "dashboards" / name).read_text() == text, "run `python3 scripts/dashboards.py`"


def test_rules_are_sound_and_prometheus_evaluates_them(observed):
    rules = CHART / "alerts" / "espalier.yaml"
    done = run(on_path("promtool", "prometheus"), "check", "rules", rules)
    assert done.returncode == 0, done.stdout + done.stderr
    address = f"http://127.0.0.1:{observed.ports['prometheus']}/api/v1/rules"
    with urllib.request.urlopen(address, timeout=CALL_S) as answer:
        (group,) = json.load(answer)["data"]["groups"]
    wrong = [f"{rule['name']}: {rule.get('lastError', '')}" for rule in group["rules"] if rule["health"] != "ok"]
    assert not wrong, wrong
    assert len(group["rules"]) == len(yaml.safe_load(rules.read_text())["groups"][0]["rules"])


def test_the_page_of_metrics_is_well_formed(observed):
    with urllib.request.urlopen(f"http://127.0.0.1:{observed.ports['coordinator']}/metrics", timeout=CALL_S) as answer:
        page = answer.read()
    done = subprocess.run(
        [on_path("promtool", "prometheus"), "check", "metrics"], input=page, capture_output=True, timeout=CALL_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_log_lines_are_json_and_name_their_trace(observed):
    lines = [json.loads(line) for line in observed.log("coordinator").splitlines()]
    traced = [line for line in lines if any("trace_id" in span for span in line.get("spans", []))]
    assert traced, lines[:3]


def spans(text):
    """Service, trace, parent, id and name of each span that the collector has printed."""
    service, found = None, []
    for block in re.split(r"(?=Resource attributes:|Span #)", text):
        if named := re.search(r"service\.name: Str\(([^)]+)\)", block):
            service = named[1]
        if span := re.search(r"Trace ID +: (\w+)\n +Parent ID +: (\w*)\n +ID +: (\w+)\n +Name +: (.+)", block):
            found.append((service, *span.groups()))
    return found


def test_one_trace_leads_from_the_client_to_every_step_of_each_worker(observed):
    all_spans = spans(observed.log("collector"))
    root = next(span for span in all_spans if span[4] == "create run")
    assert root[0] == "espalier" and not root[2]
    trace = [span for span in all_spans if span[1] == root[1]]
    by_id = {span[3]: span for span in trace}
    orphans = {(span[0], span[4]) for span in trace if span[2] and span[2] not in by_id}
    assert not orphans, orphans
    names = {(span[0], span[4]) for span in trace}
    wanted = {
        "espalier-coordinator": ["espalier.v1.RunService/CreateRun", "run", "decision"],
        "espalier-worker": ["espalier.v1.WorkerService/Train", "step", "score pass", "collective", "apply mask", "shrink", "checkpoint"],
    }
    missing = [(service, name) for service, spans in wanted.items() for name in spans if (service, name) not in names]
    assert not missing, (missing, names)
    # Both workers, each step at least once, and the collectives of a step below it.
    steps = [span for span in trace if span[4] == "step"]
    assert len(steps) >= 2 * STEPS
    below = {by_id[span[2]][4] for span in trace if span[4] == "collective"}
    assert "step" in below, below


def test_the_collector_receives_metrics(observed):
    assert "espalier.step.tokens" in observed.log("collector")
