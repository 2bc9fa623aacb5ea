"""detox-guard: keeps a local language model from saying toxic things, while it decodes.

Importing this package loads neither torch nor transformers: they come with the first model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from detox_guard.errors import (
    BackboneError,
    BackboneNotFoundError,
    DataError,
    DetoxGuardError,
    DetoxifierError,
    DetoxifierFormatError,
    DetoxifierMismatchError,
    DetoxifierNotFoundError,
    EngineBusyError,
    EngineClosedError,
    EngineError,
    GuardError,
    IncompleteAnswerError,
    InvalidParamsError,
    NotPicklableError,
    PromptError,
    PromptTooLongError,
    RequestCancelledError,
    ScorerError,
    StepError,
    UnsupportedBackboneError,
)
from detox_guard.grammar import Grammar
from detox_guard.params import DecodingParams, EngineConfig
from detox_guard.policy import GuardPolicy, Rung
from detox_guard.tools import ToolCall, ToolCallStream, function_of, parse_tool_calls

if TYPE_CHECKING:
    from detox_guard.audit import report_intervention
    from detox_guard.backbone import Backbone, load_backbone
    from detox_guard.detoxifier import Detoxifier, DetoxifierCard, SteeringStream
    from detox_guard.engine import EngineStats
    from detox_guard.generation import DetoxiGen
    from detox_guard.guard import scan
    from detox_guard.hold import aguard_text, guard_text
    from detox_guard.reply import Chunk, Generation, Steering, Usage
    from detox_guard.scoring import EmbeddedScorer, HuggingFaceScorer, ToxicityScorer, load_scorer
    from detox_guard.screening import SCREEN_NOTE, Screened, screen
    from detox_guard.text import ChatPrompt
    from detox_guard.trace import Intervention, Trace

__version__ = "0.1.0"

_LAZY = {
    "Backbone": "backbone",
    "ChatPrompt": "text",
    "Chunk": "reply",
    "Detoxifier": "detoxifier",
    "DetoxifierCard": "detoxifier",
    "DetoxiGen": "generation",
    "EmbeddedScorer": "scoring",
    "EngineStats": "engine",
    "Generation": "reply",
    "HuggingFaceScorer": "scoring",
    "Intervention": "trace",
    "Steering": "reply",
    "SteeringStream": "detoxifier",
    "Screened": "screening",
    "ToxicityScorer": "scoring",
    "Trace": "trace",
    "Usage": "reply",
    "aguard_text": "hold",
    "guard_text": "hold",
    "load_backbone": "backbone",
    "load_scorer": "scoring",
    "SCREEN_NOTE": "screening",
    "report_intervention": "audit",
    "scan": "guard",
    "screen": "screening",
}

__all__ = [
    "SCREEN_NOTE",
    "Backbone",
    "BackboneError",
    "BackboneNotFoundError",
    "ChatPrompt",
    "Chunk",
    "DataError",
    "DecodingParams",
    "DetoxGuardError",
    "DetoxiGen",
    "Detoxifier",
    "DetoxifierCard",
    "DetoxifierError",
    "DetoxifierFormatError",
    "DetoxifierMismatchError",
    "DetoxifierNotFoundError",
    "EmbeddedScorer",
    "EngineBusyError",
    "EngineClosedError",
    "EngineConfig",
    "EngineError",
    "EngineStats",
    "Generation",
    "Grammar",
    "GuardError",
    "GuardPolicy",
    "HuggingFaceScorer",
    "IncompleteAnswerError",
    "Intervention",
    "InvalidParamsError",
    "NotPicklableError",
    "PromptError",
    "PromptTooLongError",
    "RequestCancelledError",
    "Rung",
    "ScorerError",
    "Screened",
    "Steering",
    "SteeringStream",
    "StepError",
    "ToolCall",
    "ToolCallStream",
    "ToxicityScorer",
    "Trace",
    "UnsupportedBackboneError",
    "Usage",
    "__version__",
    "aguard_text",
    "function_of",
    "guard_text",
    "load_backbone",
    "load_scorer",
    "parse_tool_calls",
    "report_intervention",
    "scan",
    "screen",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
