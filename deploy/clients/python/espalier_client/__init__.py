"""A client of Espalier's RunService that loses nothing when connections or the coordinator do."""

from espalier_client.client import Client, RunFailed
from espalier_client.connection import Tls
from espalier_client.errors import EspalierError, FieldViolation

__all__ = ["Client", "EspalierError", "FieldViolation", "RunFailed", "Tls"]
