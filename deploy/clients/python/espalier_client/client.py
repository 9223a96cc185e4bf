"""What one does with runs."""

from __future__ import annotations

import contextlib
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


class RunFailed(Exception):
    """A run that ended as FAILED or CANCELLED."""

    def __init__(self, run: pb.Run) -> None:
        self.run = run
        super().__init__(f"run {run.id} ended {pb.RunState.Name(run.state)}: {run.status_message}")


class Client:
    """Calls a coordinator. `timeout` bounds each call, in seconds; `patience` how long it may be out of reach."""

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
        self._runs = run_service_pb2_grpc.RunServiceStub(self._channel)
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
        run: pb.Run = self._call(self._runs.CreateRun, request).run
        return run

    def plan(self, spec: pb.RunSpec) -> pb.RunPlan:
        """What the run would take; raises EspalierError with every wrong field when it cannot be."""
        plan: pb.RunPlan = self._call(self._runs.CreateRun, pb.CreateRunRequest(spec=spec, validate_only=True)).run.plan
        return plan

    def get(self, run_id: str) -> pb.Run:
        """A run as it is now."""
        run: pb.Run = self._call(self._runs.GetRun, pb.GetRunRequest(id=run_id)).run
        return run

    def cancel(self, run_id: str) -> pb.Run:
        """Ends a run after a checkpoint."""
        run: pb.Run = self._call(self._runs.CancelRun, pb.CancelRunRequest(id=run_id)).run
        return run

    def watch(self, run_id: str, after_revision: int = 0) -> Iterator[pb.RunEvent]:
        """Every event past `after_revision`, each once and in order, until the run ends.

        A connection that breaks and a coordinator that starts anew are waited for.
        """
        seen, failures, last = after_revision, 0, time.monotonic()
        while True:
            stream = self._runs.WatchRun(pb.WatchRunRequest(id=run_id, after_revision=seen))
            try:
                for message in stream:
                    seen, failures, last = message.event.revision, 0, time.monotonic()
                    yield message.event
                return
            except grpc.RpcError as error:
                if error.code() not in PASSING or time.monotonic() - last > self._patience:
                    raise EspalierError(error) from error
                failures += 1
                time.sleep(min(LONGEST_PAUSE_S, 0.1 * 2**failures))
            finally:
                with contextlib.suppress(Exception):
                    stream.cancel()

    def wait(self, run_id: str) -> pb.Run:
        """The run once it has ended; raises RunFailed unless it has SUCCEEDED."""
        for _ in self.watch(run_id):
            pass
        run = self.get(run_id)
        if run.state != pb.RUN_STATE_SUCCEEDED:
            raise RunFailed(run)
        return run

    def evaluate(self, run_id: str, evaluation: data_pb2.EvaluationSpec) -> list[data_pb2.Evaluation]:
        """Measures the exported model of a run on a text: a perplexity for each window length asked for."""
        request = pb.EvaluateRunRequest(id=run_id, evaluation=evaluation)
        answer = self._call(self._runs.EvaluateRun, request, self._patience)
        return [answer.evaluation, *answer.more_evaluations]

    def export(self, run_id: str, spec: pb.ExportSpec) -> pb.ExportResult:
        """Writes the pruned model of a run that has SUCCEEDED."""
        request = pb.ExportRunRequest(id=run_id, export=spec)
        result: pb.ExportResult = self._call(self._runs.ExportRun, request, self._patience).export_result
        return result

    def artifacts(self, run_id: str) -> list[pb.Artifact]:
        """The files that a run has exported."""
        return list(self._call(self._runs.ListArtifacts, pb.ListArtifactsRequest(id=run_id)).artifacts)

    def download(self, run_id: str, folder: pathlib.Path) -> list[pathlib.Path]:
        """Fetches the exported files, goes on with those that are there in part, and checks their digests."""
        folder.mkdir(parents=True, exist_ok=True)
        return [self._download(run_id, artifact, folder / artifact.name) for artifact in self.artifacts(run_id)]

    def _download(self, run_id: str, artifact: pb.Artifact, path: pathlib.Path) -> pathlib.Path:
        part, failures = path.with_name(path.name + ".part"), 0
        while True:
            offset = part.stat().st_size if part.exists() else 0
            request = pb.DownloadArtifactRequest(id=run_id, name=artifact.name, offset=offset)
            try:
                with part.open("ab") as file:
                    for message in self._runs.DownloadArtifact(request):
                        file.write(message.data)
                        failures = 0
                break
            except grpc.RpcError as error:
                failures += 1
                if error.code() not in PASSING or failures > 8:
                    raise EspalierError(error) from error
                time.sleep(min(LONGEST_PAUSE_S, 0.1 * 2**failures))
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
            raise EspalierError(error) from error
