"""What can go wrong here and nowhere else in detox-guard. Knows no Ray."""

from __future__ import annotations

from detox_guard import EngineClosedError

__all__ = ["ReplicaLostError"]


class ReplicaLostError(EngineClosedError):
    """A replica was lost under way, and no other could go on with the same text. The server answers it with 503."""

    retryable = True
