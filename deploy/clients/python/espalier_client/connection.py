"""How the coordinator is reached: TLS, tokens, and calls that are made again."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import grpc

SERVICE = "espalier.v1.RunService"
# Calls that change nothing, or the same when made twice: CreateRun and ForkRun bear a request_id.
REPEATABLE = (
    *("CreateRun", "ForkRun", "GetRun", "ListRuns", "ListDecisions", "GetKeepMask", "ListArtifacts", "QueryWhatIf"),
    *("PauseRun", "ResumeRun", "CancelRun", "EvaluateRun"),
)


def _again(methods: Sequence[str], codes: Sequence[str]) -> dict[str, object]:
    """Calls that gRPC makes again by itself, five times in all, and that wait for a connection."""
    policy = {"maxAttempts": 5, "initialBackoff": "0.5s", "maxBackoff": "10s", "backoffMultiplier": 2, "retryableStatusCodes": codes}
    return {
        "name": [{"service": SERVICE, "method": method} for method in methods],
        "retryPolicy": policy,
        "waitForReady": True,
    }


# RESOURCE_EXHAUSTED, which is said before anything is done: no worker is idle, or too many calls are under way.
SERVICE_CONFIG = {
    "methodConfig": [
        _again(REPEATABLE, ("UNAVAILABLE", "RESOURCE_EXHAUSTED")),
        _again(("ExportRun",), ("RESOURCE_EXHAUSTED",)),
    ]
}
# Connections that went silent are noticed.
KEEP_ALIVE = [("grpc.keepalive_time_ms", 20_000), ("grpc.keepalive_timeout_ms", 10_000)]
RECONNECT = [("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 5_000)]
MESSAGE_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Tls:
    """Files in PEM: who may sign the coordinator's certificate, and a certificate to show with its key."""

    ca: pathlib.Path
    cert: pathlib.Path | None = None
    key: pathlib.Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        def read(path: pathlib.Path | None) -> bytes | None:
            return None if path is None else path.read_bytes()

        return grpc.ssl_channel_credentials(read(self.ca), read(self.key), read(self.cert))


class _Bearer(grpc.AuthMetadataPlugin):  # type: ignore[misc]
    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, context: grpc.AuthMetadataContext, callback: grpc.AuthMetadataPluginCallback) -> None:
        callback((("authorization", f"Bearer {self._token}"),), None)


def options() -> list[tuple[str, object]]:
    """Of a channel: the calls that are made again by themselves, and how soon a lost connection is noticed."""
    sizes = [("grpc.max_receive_message_length", MESSAGE_BYTES), ("grpc.service_config", json.dumps(SERVICE_CONFIG))]
    return [*sizes, *KEEP_ALIVE, *RECONNECT]


def channel(target: str, token: str | None, tls: Tls | None) -> grpc.Channel:
    """A channel to `host:port`.

    Raises ValueError for a token without TLS to another machine: it could be read on the way.
    """
    if tls is None:
        host = target.rsplit(":", 1)[0].strip("[]")
        if token and host not in ("localhost", "127.0.0.1", "::1"):
            raise ValueError(f"a token is not sent to {host} in plain text; give `tls`")
        credentials = grpc.local_channel_credentials() if token else None
        if credentials is None:
            return grpc.insecure_channel(target, options())
    else:
        credentials = tls.credentials()
    if token:
        credentials = grpc.composite_channel_credentials(credentials, grpc.metadata_call_credentials(_Bearer(token)))
    return grpc.secure_channel(target, credentials, options())
