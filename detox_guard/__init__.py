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
from detox_guard.settings import DecodingParams, EngineConfig, GuardPolicy, Rung
from detox_guard.text.grammar import Grammar
from detox_guard.text.tools import ToolCall, ToolCallStream, function_of, parse_tool_calls

if TYPE_CHECKING:
    from detox_guard.detoxifiers.soft_prompt import Detoxifier, DetoxifierCard, SteeringStream
    from detox_guard.detoxigen import DetoxiGen
    from detox_guard.engine import EngineStats
    from detox_guard.guard.audit import report_intervention
    from detox_guard.guard.reply import scan
    from detox_guard.guard.screen import SCREEN_NOTE, Screened, screen
    from detox_guard.guard.stream import aguard_text, guard_text
    from detox_guard.models.backbone import Backbone
    from detox_guard.models.load import load_backbone
    from detox_guard.results import Chunk, Generation, Intervention, Steering, Trace, Usage
    from detox_guard.scorers.linear import EmbeddedScorer, HuggingFaceScorer, ToxicityScorer, load_scorer
    from detox_guard.text.prompts import ChatPrompt

__version__ = "0.1.0"

_LAZY = {
    "Backbone": "models.backbone",
    "ChatPrompt": "text.prompts",
    "Chunk": "results",
    "Detoxifier": "detoxifiers.soft_prompt",
    "DetoxifierCard": "detoxifiers.soft_prompt",
    "DetoxiGen": "detoxigen",
    "EmbeddedScorer": "scorers.linear",
    "EngineStats": "engine",
    "Generation": "results",
    "HuggingFaceScorer": "scorers.linear",
    "Intervention": "results",
    "Steering": "results",
    "SteeringStream": "detoxifiers.soft_prompt",
    "Screened": "guard.screen",
    "ToxicityScorer": "scorers.linear",
    "Trace": "results",
    "Usage": "results",
    "aguard_text": "guard.stream",
    "guard_text": "guard.stream",
    "LoadOptions": "models.options",
    "load_backbone": "models.load",
    "load_scorer": "scorers.linear",
    "SCREEN_NOTE": "guard.screen",
    "report_intervention": "guard.audit",
    "scan": "guard.reply",
    "screen": "guard.screen",
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
