"""detox-guard: keeps a local language model from saying toxic things, while it decodes.

Importing this package loads nothing: each name is fetched from its module when it is first used, and torch and
transformers come with the first model. Knows where each public name lives; knows nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_EXPORTS = {
    "_strict": "StrictModel field_of",
    "detoxifiers.card": "DetoxifierCard",
    "detoxifiers.soft_prompt": "Detoxifier SteeringStream",
    "detoxifiers.text_view": "TextView",
    "detoxigen": "DetoxiGen",
    "engine": "EngineStats",
    "errors": (
        "BackboneError BackboneNotFoundError DataError DetoxGuardError DetoxifierError DetoxifierFormatError "
        "DetoxifierMismatchError DetoxifierNotFoundError EngineBusyError EngineClosedError EngineError GuardError "
        "IncompleteAnswerError InvalidParamsError NotPicklableError PromptError PromptTooLongError "
        "RequestCancelledError ScorerError StepError UnsupportedBackboneError"
    ),
    "guard.audit": "report_intervention",
    "guard.reply": "scan",
    "guard.screen": "SCREEN_NOTE Screened replace_strings screen",
    "guard.stream": "aguard_text guard_text",
    "models.backbone": "Backbone",
    "models.load": "load_backbone",
    "models.options": "LoadOptions",
    "results": "Chunk Generation Intervention Steering TokenTrace Trace Usage",
    "scorers.base": "ToxicityScorer load_scorer",
    "scorers.classifier": "HuggingFaceScorer",
    "scorers.linear": "EmbeddedScorer",
    "settings": "DecodingParams EngineConfig GuardPolicy Rung",
    "text.grammar": "Grammar",
    "text.prompts": "ChatPrompt",
    "text.tools": "ToolCall ToolCallStream function_of parse_tool_calls tool_choice_of",
}
"""What each module gives to the public. `__all__`, `__getattr__` and `__dir__` are made from it; a test holds the names
that type checkers read, below, to it."""
_MODULES = {name: module for module, names in _EXPORTS.items() for name in names.split()}

__all__ = sorted([*_MODULES, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]

# isort: off
if TYPE_CHECKING:
    from detox_guard._strict import StrictModel as StrictModel, field_of as field_of
    from detox_guard.detoxifiers.card import DetoxifierCard as DetoxifierCard
    from detox_guard.detoxifiers.soft_prompt import Detoxifier as Detoxifier, SteeringStream as SteeringStream
    from detox_guard.detoxifiers.text_view import TextView as TextView
    from detox_guard.detoxigen import DetoxiGen as DetoxiGen
    from detox_guard.engine import EngineStats as EngineStats
    from detox_guard.errors import (
        BackboneError as BackboneError,
        BackboneNotFoundError as BackboneNotFoundError,
        DataError as DataError,
        DetoxGuardError as DetoxGuardError,
        DetoxifierError as DetoxifierError,
        DetoxifierFormatError as DetoxifierFormatError,
        DetoxifierMismatchError as DetoxifierMismatchError,
        DetoxifierNotFoundError as DetoxifierNotFoundError,
        EngineBusyError as EngineBusyError,
        EngineClosedError as EngineClosedError,
        EngineError as EngineError,
        GuardError as GuardError,
        IncompleteAnswerError as IncompleteAnswerError,
        InvalidParamsError as InvalidParamsError,
        NotPicklableError as NotPicklableError,
        PromptError as PromptError,
        PromptTooLongError as PromptTooLongError,
        RequestCancelledError as RequestCancelledError,
        ScorerError as ScorerError,
        StepError as StepError,
        UnsupportedBackboneError as UnsupportedBackboneError,
    )
    from detox_guard.guard.audit import report_intervention as report_intervention
    from detox_guard.guard.reply import scan as scan
    from detox_guard.guard.screen import (
        SCREEN_NOTE as SCREEN_NOTE,
        Screened as Screened,
        replace_strings as replace_strings,
        screen as screen,
    )
    from detox_guard.guard.stream import aguard_text as aguard_text, guard_text as guard_text
    from detox_guard.models.backbone import Backbone as Backbone
    from detox_guard.models.load import load_backbone as load_backbone
    from detox_guard.models.options import LoadOptions as LoadOptions
    from detox_guard.results import (
        Chunk as Chunk,
        Generation as Generation,
        Intervention as Intervention,
        Steering as Steering,
        TokenTrace as TokenTrace,
        Trace as Trace,
        Usage as Usage,
    )
    from detox_guard.scorers.base import ToxicityScorer as ToxicityScorer, load_scorer as load_scorer
    from detox_guard.scorers.classifier import HuggingFaceScorer as HuggingFaceScorer
    from detox_guard.scorers.linear import EmbeddedScorer as EmbeddedScorer
    from detox_guard.settings import (
        DecodingParams as DecodingParams,
        EngineConfig as EngineConfig,
        GuardPolicy as GuardPolicy,
        Rung as Rung,
    )
    from detox_guard.text.grammar import Grammar as Grammar
    from detox_guard.text.prompts import ChatPrompt as ChatPrompt
    from detox_guard.text.tools import (
        ToolCall as ToolCall,
        ToolCallStream as ToolCallStream,
        function_of as function_of,
        parse_tool_calls as parse_tool_calls,
        tool_choice_of as tool_choice_of,
    )
# isort: on


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return __all__
