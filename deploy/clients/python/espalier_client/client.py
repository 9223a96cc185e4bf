"""What one does with runs."""

from __future__ import annotations

import hashlib
import pathlib
import time
import uuid
from collections.abc import Iterator
from typing import Any

import grpc
from espalier.v1 import data_pb2, run_service_pb2_grpc
from espalier.v1 import run_service_pb2 as pb

from espalier_client.connection import Tls, channel
from espalier_client.errors import EspalierError

ENDED = (pb.RUN_STATE_SUCCEEDED, pb.RUN_STATE_FAILED, pb.RUN_STATE_CANCELLED)
# A stream that ends so is begun anew where it was.
PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
LONGEST_PAUSE_S = 5.0
# A stream is begun anew after an hour: so long may a server that hangs go unnoticed.
STREAM_S = 3600.0
# EvaluateRun and ExportRun answer when the work is done; the coordinator allows as much by default.
LONG_CALL_S = 7200.0


class RunFailed(Exception):
    """A run that ended as FAILED or CANCELLED."""

    def __init__(self, run: pb.Run) -> None:
        self.run = run
        super().__init__(f"run {run.id} ended {pb.RunState.Name(run.state)}: {run.status_message}")


class _Away:
    """How long the coordinator has been out of reach, and when to try it again."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self.over()

    def over(self) -> None:
        """It is there."""
        self._since: float | None = None
        self._pause = 0.1

    def again(self, error: grpc.RpcError) -> None:
        """Waits a moment; raises EspalierError when the call failed for good, or patience is at its end."""
        now = time.monotonic()
        self._since = self._since or now
        if error.code() not in PASSING or now - self._since > self._patience:
            raise EspalierError(error) from error
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE_S)


class Client:
    """Calls a coordinator at `host:port`.

    `timeout` bounds each quick call, in seconds; `patience` how long the coordinator may be out of reach while a run is watched or
    a file is fetched. `stub` has every call of the service.
    """

    def __init__(
        self,
        target: str,
        *,
        token: str | None = None,
        tls: Tls | None = None,
        timeout: float = 30.0,
        patience: float = 300.0,
    ) -> None:
        self._channel = channel(target, token, tls)
        self.stub = run_service_pb2_grpc.RunServiceStub(self._channel)
        self._timeout, self._patience = timeout, patience

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()

    def create(self, spec: pb.RunSpec, request_id: str | None = None) -> pb.Run:
        """Creates a run. Repeating a `request_id` returns the run that it made."""
        request = pb.CreateRunRequest(spec=spec, request_id=request_id or str(uuid.uuid4()))
        run: pb.Run = self._call(self.stub.CreateRun, request).run
        return run

    def plan(self, spec: pb.RunSpec) -> pb.RunPlan:
        """What the run would take; raises EspalierError with every wrong field when it cannot be."""
        plan: pb.RunPlan = self._call(self.stub.CreateRun, pb.CreateRunRequest(spec=spec, validate_only=True)).run.plan
        return plan

    def get(self, run_id: str) -> pb.Run:
        """A run as it is now."""
        run: pb.Run = self._call(self.stub.GetRun, pb.GetRunRequest(id=run_id)).run
        return run

    def pause(self, run_id: str) -> pb.Run:
        """Checkpoints a run and gives its workers back."""
        run: pb.Run = self._call(self.stub.PauseRun, pb.PauseRunRequest(id=run_id)).run
        return run

    def resume(self, run_id: str) -> pb.Run:
        """Lets a paused run go on."""
        run: pb.Run = self._call(self.stub.ResumeRun, pb.ResumeRunRequest(id=run_id)).run
        return run

    def cancel(self, run_id: str) -> pb.Run:
        """Ends a run after a checkpoint."""
        run: pb.Run = self._call(self.stub.CancelRun, pb.CancelRunRequest(id=run_id)).run
        return run

    def watch(self, run_id: str, after_revision: int = 0) -> Iterator[pb.RunEvent]:
        """Every event past `after_revision`, each once and in order, until the run ends.

        A connection that breaks and a coordinator that starts anew are waited for, for as long as `patience` each time.
        """
        seen, ended, away = after_revision, False, _Away(self._patience)
        while not ended:
            opened: float | None = None
            stream = self.stub.WatchRun(pb.WatchRunRequest(id=run_id, after_revision=seen), timeout=STREAM_S)
            try:
                stream.initial_metadata()
                opened = time.monotonic() if stream.is_active() else None
                for message in stream:
                    away.over()
                    seen = message.event.revision
                    yield message.event
                # A coordinator that stops ends its streams as well.
                run = self.stub.GetRun(pb.GetRunRequest(id=run_id), timeout=self._timeout).run
                ended = run.state in ENDED and seen >= run.revision
                away.over()
                time.sleep(0 if ended else 0.2)
            except grpc.RpcError as error:
                # A run that waits for workers has no events; a stream that breaks as soon as it is open is no sign of life.
                if opened is not None and time.monotonic() - opened > LONGEST_PAUSE_S:
                    away.over()
                away.again(error)
            finally:
                stream.cancel()

    def wait(self, run_id: str) -> pb.Run:
        """The run once it has ended; raises RunFailed unless it has SUCCEEDED."""
        for _ in self.watch(run_id, self.get(run_id).revision):
            pass
        run = self.get(run_id)
        if run.state != pb.RUN_STATE_SUCCEEDED:
            raise RunFailed(run)
        return run

    def evaluate(self, run_id: str, evaluation: data_pb2.EvaluationSpec) -> list[data_pb2.Evaluation]:
        """Measures the exported model of a run on a text: a perplexity for each window length asked for."""
        request = pb.EvaluateRunRequest(id=run_id, evaluation=evaluation)
        answer = self._long_call(self.stub.EvaluateRun, request)
        return [answer.evaluation, *answer.more_evaluations]

    def export(self, run_id: str, spec: pb.ExportSpec) -> pb.ExportResult:
        """Writes the pruned model of a run that has SUCCEEDED."""
        request = pb.ExportRunRequest(id=run_id, export=spec)
        result: pb.ExportResult = self._long_call(self.stub.ExportRun, request).export_result
        return result

    def artifacts(self, run_id: str) -> list[pb.Artifact]:
        """The files that a run has exported."""
        return list(self._call(self.stub.ListArtifacts, pb.ListArtifactsRequest(id=run_id)).artifacts)

    def download(self, run_id: str, folder: pathlib.Path) -> list[pathlib.Path]:
        """Fetches the exported files, goes on with those that are there in part, and checks their digests."""
        folder.mkdir(parents=True, exist_ok=True)
        artifacts = self.artifacts(run_id)
        for artifact in artifacts:
            if pathlib.PurePath(artifact.name).name != artifact.name:
                raise OSError(f"`{artifact.name}` is no name of a file")
        return [self._download(run_id, artifact, folder / artifact.name) for artifact in artifacts]

    def _download(self, run_id: str, artifact: pb.Artifact, path: pathlib.Path) -> pathlib.Path:
        part, away = path.with_name(path.name + ".part"), _Away(self._patience)
        if part.exists() and part.stat().st_size > artifact.size_bytes:
            part.unlink()
        while True:
            offset = part.stat().st_size if part.exists() else 0
            request = pb.DownloadArtifactRequest(id=run_id, name=artifact.name, offset=offset)
            try:
                with part.open("ab") as file:
                    for message in self.stub.DownloadArtifact(request, timeout=STREAM_S):
                        file.write(message.data)
                        away.over()
                break
            except grpc.RpcError as error:
                away.again(error)
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != artifact.sha256:
            part.unlink()
            raise OSError(f"{artifact.name} has SHA-256 {digest}, expected {artifact.sha256}; fetch it again")
        part.replace(path)
        return path

    def _call(self, method: Any, request: Any, timeout: float | None = None) -> Any:
        try:
            return method(request, timeout=timeout or self._timeout)
        except grpc.RpcError as error:
            raise EspalierError(self._out_of_reach(error)) from error

    def _long_call(self, method: Any, request: Any) -> Any:
        """A call that may take hours, which a coordinator out of reach must not."""
        self.get(request.id)
        return self._call(method, request, LONG_CALL_S)

    def _out_of_reach(self, error: grpc.RpcError) -> grpc.RpcError:
        """Why a call that has waited for a connection got none, such as a certificate that is refused."""
        if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
            try:
                # Waits for nothing, and is not made again.
                next(iter(self.stub.WatchRun(pb.WatchRunRequest(), timeout=5)), None)
            except grpc.RpcError as found:
                return found if found.code() == grpc.StatusCode.UNAVAILABLE else error
        return error
