"""The session of docs/operations.md, typed through `grpcurl` against a real coordinator and a real worker.

Nothing here has the schema but from the server.
"""

import base64
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import grpc
import pytest
from conftest import REPOSITORY, run, tool
from google.protobuf import descriptor_pool, json_format, message_factory
from google.rpc import error_details_pb2, status_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

DOCUMENT = REPOSITORY / "docs" / "operations.md"
# As the document writes them.
ADDRESS = "127.0.0.1:7070"
ROOT = "/srv/espalier"
# Of a run, which trains some hundred steps in unoptimised programs on whatever machine this is.
PATIENCE_S = 300
CALL_S = 60
ENDED = ("RUN_STATE_SUCCEEDED", "RUN_STATE_FAILED", "RUN_STATE_CANCELLED")


def documented_commands():
    """The grpcurl lines of the document, each as its words."""
    commands = []
    for block in re.findall(r"^```sh\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE):
        so_far = ""
        for line in block.splitlines(keepends=True):
            so_far += line
            try:
                words = shlex.split(so_far, comments=True)
            except ValueError:
                # A quotation goes on in the next line.
                continue
            so_far = ""
            if words and words[0] == "grpcurl":
                commands.append(words[1:])
        assert not so_far, f"a quotation has no end: {so_far}"
    return commands


class Deployment:
    """A coordinator and one worker, and what the session has learned of them."""

    def __init__(self, folder):
        self.folder = folder
        self.root = folder / "root"
        self.processes = []
        self.address = None
        self.names = {}

    def start(self):
        (self.root / "state").mkdir(parents=True)
        shutil.copytree(REPOSITORY / "tests" / "fixtures" / "models" / "gqa", self.root / "models" / "my-llama")
        texts = REPOSITORY / "tests" / "fixtures" / "text"
        (self.root / "text").mkdir()
        for text, name in (("tiny", "train"), ("held_out", "test"), ("held_out", "other")):
            shutil.copy(texts / f"{text}.txt", self.root / "text" / f"{name}.txt")
        self.spawn("coordinator", "--data-dir", self.root / "state")
        self.address = self.logged("coordinator", r"coordinator listens.*address=(\S+)")
        coordinator = f"http://{self.address}"
        self.spawn("worker", "--coordinator", coordinator, "--id", "worker-1", "--threads", "1")
        self.logged("worker", r"(registered)")

    def spawn(self, name, *arguments):
        binary = REPOSITORY / "target" / "debug" / name
        assert binary.is_file(), f"{binary} is missing; `make test-service` builds it"
        command = [str(part) for part in (binary, "--listen", "127.0.0.1:0", "--root", self.root, *arguments)]
        with (self.folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.processes.append((name, process))

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()

    def logged(self, name, pattern):
        """What a process says of itself at its start."""
        give_up = time.monotonic() + CALL_S
        while time.monotonic() < give_up:
            if found := re.search(pattern, self.log(name)):
                return found[1]
            assert all(process.poll() is None for _, process in self.processes), self.log(name)
            time.sleep(0.05)
        raise AssertionError(f"{name} does not say {pattern}:\n{self.log(name)}")

    def stop(self):
        for _, process in reversed(self.processes):
            process.terminate()
            try:
                process.wait(CALL_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def fill_in(self, word):
        word = word.replace(ADDRESS, self.address).replace(ROOT, str(self.root))
        for name, value in self.names.items():
            word = word.replace(f'"{name}"', json.dumps(value))
        return word

    def command(self, words):
        """A grpcurl command with this deployment's names in it."""
        return [tool("grpcurl"), *(self.fill_in(word) for word in words)]

    def begin(self, words):
        """Starts a call that goes on while others are made."""
        pipe = subprocess.PIPE
        return subprocess.Popen(self.command(words), stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)

    def answers(self, words, patience=CALL_S):
        return outcome(self.begin(words), patience)

    def answer(self, words, patience=CALL_S):
        (only,) = self.answers(words, patience)
        return only

    def call(self, service, method, request):
        """A call that the document does not show at this place."""
        return self.answer(["-plaintext", "-d", json.dumps(request), ADDRESS, f"espalier.v1.{service}/{method}"])

    def run_in(self, name, *states):
        """Waits for a run to be in one of these states."""
        give_up = time.monotonic() + PATIENCE_S
        while time.monotonic() < give_up:
            shown = self.call("RunService", "GetRun", {"id": self.names[name]})["run"]
            if shown["state"] in states:
                return shown
            assert shown["state"] not in ENDED, f"{shown['state']}: {shown.get('statusMessage')}"
            time.sleep(0.1)
        raise AssertionError(f"{name} is not in {states} but in {shown['state']}: {shown.get('statusMessage')}")


def outcome(process, patience):
    """All messages of a call that succeeds."""
    try:
        out, err = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"no end of the call within {patience} s; so far:\n{out}{err}") from None
    assert process.returncode == 0, err or out
    return documents(out)


def documents(text):
    """JSON documents one after the other."""
    decoder = json.JSONDecoder()
    found = []
    place = 0
    while (text := text[place:].lstrip()) != "":
        document, place = decoder.raw_decode(text)
        found.append(document)
    return found


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    deployment = Deployment(tmp_path_factory.mktemp("session"))
    try:
        deployment.start()
        yield deployment
    finally:
        deployment.stop()


def method_of(words):
    return words[-1].rsplit("/", 1)[-1] if "/" in words[-1] else " ".join(words[2:3])


class Session:
    """The document's commands, taken one by one in their order."""

    def __init__(self, deployment):
        self.deployment = deployment
        self.left = documented_commands()

    def next(self, method):
        """The next command, which must be this one."""
        while self.left and method_of(self.left[0]) != method:
            # The ladder's own list of decisions stands before the session.
            assert method == "list" and method_of(self.left[0]) == "ListDecisions", (method, self.left[0])
            self.left.pop(0)
        assert self.left, f"the document does not show {method}"
        return self.left.pop(0)

    def answer(self, method, patience=CALL_S):
        return self.deployment.answer(self.next(method), patience)

    def lines(self, method):
        words = self.deployment.command(self.next(method))
        done = run(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()


def test_the_documented_session_shows_every_call_and_every_call_answers(deployment):
    session = Session(deployment)
    names = deployment.names
    root = deployment.root

    # What there is.
    services = session.lines("list")
    assert {"espalier.v1.RunService", "espalier.v1.RegistryService", "grpc.health.v1.Health"} <= set(services)
    methods = {line.removeprefix("espalier.v1.RunService.") for line in session.lines("list")}
    assert len(methods) == 17 and {"CreateRun", "DownloadArtifact"} <= methods
    described = session.lines("describe")
    assert any("training_data" in line for line in described)
    assert session.answer("Check") == {"status": "SERVING"}
    (worker,) = session.answer("ListWorkers")["workers"]
    assert worker["info"]["id"] == "worker-1" and worker["info"]["device"] == "cpu" and "runId" not in worker
    names["WORKER"] = worker["info"]["id"]

    # Checked, then made; made again, it is the same.
    checked = session.answer("CreateRun")["run"]
    assert "id" not in checked
    plan = checked["plan"]
    assert int(plan["prunedParameters"]) < int(plan["denseParameters"])
    assert len(plan["pruningSteps"]) > 1 and len(plan["layers"]) == 4
    assert deployment.call("RunService", "ListRuns", {}) == {}, "nothing was stored"
    create = session.next("CreateRun")
    made = deployment.answer(create)["run"]
    names["RUN"] = made["id"]
    assert made["spec"]["displayName"] == "half of my-llama" and made["plan"] == plan
    assert deployment.answer(create)["run"]["id"] == made["id"]

    # Looked at while it works.
    watching = deployment.begin(session.next("WatchRun"))
    got = session.answer("GetRun")["run"]
    assert got["id"] == made["id"] and int(got["spec"]["recipe"]["steps"]) == 400
    (listed,) = session.answer("ListRuns")["runs"]
    assert listed["id"] == made["id"]

    # Paused and resumed.
    deployment.run_in("RUN", "RUN_STATE_RUNNING")
    assert session.answer("PauseRun")["run"]["state"] in ("RUN_STATE_PAUSING", "RUN_STATE_PAUSED")
    paused = deployment.run_in("RUN", "RUN_STATE_PAUSED")
    (worker,) = deployment.call("RegistryService", "ListWorkers", {})["workers"]
    assert "workerIds" not in paused and "runId" not in worker
    assert session.answer("ResumeRun")["run"]["state"] not in ("RUN_STATE_PAUSING", "RUN_STATE_PAUSED")

    # Seen to its end: each event once, in order, none repeated by the pause.
    events = [message["event"] for message in outcome(watching, PATIENCE_S)]
    ended = deployment.run_in("RUN", "RUN_STATE_SUCCEEDED")
    assert [int(event["revision"]) for event in events] == list(range(1, int(ended["revision"]) + 1))
    states = [event["stateChange"]["state"].removeprefix("RUN_STATE_") for event in events if "stateChange" in event]
    course = "QUEUED STARTING RUNNING PAUSING PAUSED RECOVERING STARTING RUNNING EXPORTING SUCCEEDED"
    assert in_order(course.split(), states), states
    assert [int(event["step"].get("step", 0)) for event in events if "step" in event] == list(range(400))
    assert [evaluation["label"] for evaluation in ended["evaluations"]] == ["dense", "pruned"]
    assert "restarts" not in ended

    # What it has decided, and on what.
    decisions = session.answer("ListDecisions")["decisions"]
    assert [int(decision["generation"]) for decision in decisions] == list(range(1, len(plan["pruningSteps"]) + 1))
    assert [int(decision["step"]) for decision in decisions] == [int(step) for step in plan["pruningSteps"]]
    assert decisions[-1]["parameters"] == plan["prunedParameters"]
    mask = session.answer("GetKeepMask")
    names_of_widths = ("queryHeads", "kvHeads", "channels")
    kept = [{name: len(layer[name]) for name in names_of_widths} for layer in mask["keepMask"]["layers"]]
    assert mask["generation"] == "1" and kept == decisions[0]["layers"]
    chunks = deployment.answers(session.next("WatchImportance"))
    assert [chunk["generation"] for chunk in chunks if chunk.get("last")] == [one["generation"] for one in decisions]
    first = [chunk for chunk in chunks if chunk["generation"] == "1"]
    assert {chunk["block"] for chunk in first} == {"BLOCK_ATTENTION", "BLOCK_MLP"} and len(first) == 8
    assert sum(len(chunk["values"]) for chunk in first) == 4 * (3 + 40), "kv heads and channels of the dense model"
    what_if = session.answer("QueryWhatIf")
    assert int(plan["prunedParameters"]) < int(what_if["parameters"]) < int(plan["denseParameters"])
    assert 0 < what_if["importanceLostShare"] < 1 and len(what_if["layers"]) == 4

    # What came out.
    again = session.answer("EvaluateRun")["evaluation"]
    assert again["label"] == "exported"
    assert again["perplexity"] == pytest.approx(ended["evaluations"][1]["perplexity"], rel=0.05), "the same text"
    result = session.answer("ExportRun")["exportResult"]
    assert result["path"] == f"{root}/out/my-llama-50-bf16"
    assert int(result["weightBytes"]) * 2 == int(ended["exportResult"]["weightBytes"]), "bf16 after f32"
    artifacts = {artifact["name"]: artifact for artifact in session.answer("ListArtifacts")["artifacts"]}
    assert {"config.json", "model.safetensors"} <= set(artifacts)
    parts = deployment.answers(session.next("DownloadArtifact"))
    data = b"".join(base64.b64decode(part.get("data", "")) for part in parts)
    assert data == Path(ended["exportResult"]["path"], "config.json").read_bytes()
    assert hashlib.sha256(data).hexdigest() == artifacts["config.json"]["sha256"] == parts[0]["artifact"]["sha256"]

    # Another run from its first decision.
    fork = session.answer("ForkRun")["run"]
    assert fork["forkedFrom"] == {"runId": names["RUN"], "generation": "1"} and fork["id"] != names["RUN"]
    names["FORK"] = fork["id"]
    assert session.answer("CancelRun")["run"]["state"] in ("RUN_STATE_CANCELLING", "RUN_STATE_CANCELLED")
    assert deployment.run_in("FORK", "RUN_STATE_CANCELLED")["generation"] == "1"
    assert session.answer("DeleteRun") == {}
    (left,) = deployment.call("RunService", "ListRuns", {})["runs"]
    assert left["id"] == names["RUN"]

    # What workers say.
    lease = session.answer("Register")
    assert lease["leaseDuration"] == "10s"
    names["LEASE"] = lease["leaseId"]
    assert len(deployment.call("RegistryService", "ListWorkers", {})["workers"]) == 2
    assert session.answer("Renew") == {"leaseDuration": "10s", "idle": True, "poolWorkers": 2}
    assert session.answer("Deregister") == {}
    assert session.answer("DrainWorker")["worker"]["draining"] is True
    (worker,) = deployment.call("RegistryService", "ListWorkers", {})["workers"]
    assert worker["info"]["id"] == "worker-1" and worker["draining"]

    # A refusal says why, for programs too.
    refused = deployment.begin(session.next("GetRun"))
    out, err = refused.communicate(timeout=CALL_S)
    assert refused.returncode != 0
    assert_refused(out + err, "no-such-run", "RUN_NOT_FOUND")
    assert not session.left, "the document shows more than this types"


def in_order(wanted, found):
    """Whether all that is wanted comes in this order, whatever comes between."""
    found = iter(found)
    return all(any(each == want for each in found) for want in wanted)


def assert_refused(text, word, reason):
    """A status as grpcurl prints it, with its details as bytes in Base64 where it does not know their types."""
    assert word in text
    assert re.search(r"not_?found", text, re.IGNORECASE)
    if reason not in text:
        (value,) = re.findall(r'"@value":"([A-Za-z0-9+/=]+)"', text)
        info = error_details_pb2.ErrorInfo.FromString(base64.b64decode(value + "=" * (-len(value) % 4)))
        assert (info.domain, info.reason) == ("espalier", reason)


def reflected(deployment):
    channel = grpc.insecure_channel(deployment.address)
    return descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))


def test_every_method_is_in_the_document():
    shown = {words[-1].removeprefix("espalier.v1.") for words in documented_commands() if "/" in words[-1]}
    for service in ("run", "registry"):
        text = (REPOSITORY / "proto" / "espalier" / "v1" / f"{service}_service.proto").read_text()
        for method in re.findall(r"^  rpc (\w+)\(", text, re.MULTILINE):
            assert f"{service.capitalize()}Service/{method}" in shown


def test_a_client_with_nothing_but_reflection_learns_of_every_wrong_field_at_once(deployment):
    pool = reflected(deployment)
    method = pool.FindServiceByName("espalier.v1.RunService").FindMethodByName("CreateRun")
    request_class, response_class = map(message_factory.GetMessageClass, (method.input_type, method.output_type))
    spec = {"model": "/etc", "trainingData": [{"path": "text.txt"}], "tpDegree": 0}
    request = json_format.ParseDict({"validateOnly": True, "spec": spec}, request_class())
    with grpc.insecure_channel(deployment.address) as channel:
        call = channel.unary_unary(
            "/espalier.v1.RunService/CreateRun",
            request_serializer=request_class.SerializeToString,
            response_deserializer=response_class.FromString,
        )
        with pytest.raises(grpc.RpcError) as refused:
            call(request, timeout=CALL_S)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    details = dict(refused.value.trailing_metadata())["grpc-status-details-bin"]
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status_pb2.Status.FromString(details).details:
        assert detail.Unpack(info) or detail.Unpack(bad)
    assert (info.domain, info.reason) == ("espalier", "INVALID_FIELDS")
    fields = {violation.field for violation in bad.field_violations}
    assert {"spec.model", "spec.training_data[0].path", "spec.tp_degree"} <= fields
