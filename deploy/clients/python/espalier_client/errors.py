"""Failed calls, with what the service says of them (AIP-193)."""

from __future__ import annotations

import dataclasses

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status


@dataclasses.dataclass(frozen=True)
class FieldViolation:
    """A field of the request and what is wrong with it."""

    field: str
    problem: str


class EspalierError(Exception):
    """A call that failed for good.

    `code` is the status, such as `NOT_FOUND`; `reason` the service's own, such as `RUN_NOT_FOUND`; `facts` what it names,
    such as `run_id`.
    """

    def __init__(self, error: grpc.RpcError) -> None:
        self.code: str = error.code().name
        self.message: str = error.details() or ""
        self.reason = ""
        self.facts: dict[str, str] = {}
        self.violations: list[FieldViolation] = []
        status = rpc_status.from_call(error)
        for detail in status.details if status is not None else []:
            info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
            if detail.Unpack(info):
                self.reason, self.facts = info.reason, dict(info.metadata)
            elif detail.Unpack(bad_request):
                wrong = bad_request.field_violations
                self.violations = [FieldViolation(each.field, each.description) for each in wrong]
        shown = "".join(f"\n  {each.field}: {each.problem}" for each in self.violations)
        super().__init__(f"{self.code} {self.reason}: {self.message}{shown}")
