"""The engine: token ids in, token ids out. Knows rows, caches and steps; knows no text and no framework."""

from detox_guard.engine.base import Ended, Finish, Request, Rewind, Sink, TokenConstraint, TokenStep
from detox_guard.engine.scheduler import Engine, EngineStats

__all__ = [
    "Ended",
    "Engine",
    "EngineStats",
    "Finish",
    "Request",
    "Rewind",
    "Sink",
    "TokenConstraint",
    "TokenStep",
]
