"""The engine: token ids in, token ids out. Knows rows, prompts and steps; knows no text and no framework."""

from detox_guard.engine.base import (
    End,
    Engine,
    EngineStats,
    Finish,
    Go,
    PromptIds,
    Request,
    Rewind,
    Sampling,
    Sink,
    TokenConstraint,
    TokenStep,
    Verdict,
)
from detox_guard.engine.scheduler import Scheduler

__all__ = [
    "End",
    "Engine",
    "EngineStats",
    "Finish",
    "Go",
    "PromptIds",
    "Request",
    "Rewind",
    "Sampling",
    "Scheduler",
    "Sink",
    "TokenConstraint",
    "TokenStep",
    "Verdict",
]
