"""Does steering work on your model? How toxic, how fluent and how fast its text is, plain, steered and guarded.

Nothing here is needed to serve, and nothing is loaded before it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detox_guard.evaluation.bench import BenchReport, run_bench
    from detox_guard.evaluation.config import BenchConfig, EvalConfig
    from detox_guard.evaluation.prompts import EvalPrompt, choose_prompts, read_passages, read_prompts
    from detox_guard.evaluation.report import write_report
    from detox_guard.evaluation.run import rescore, run_eval
    from detox_guard.evaluation.tables import EvalReport

__all__ = [
    "BenchConfig",
    "BenchReport",
    "EvalConfig",
    "EvalPrompt",
    "EvalReport",
    "choose_prompts",
    "read_passages",
    "read_prompts",
    "rescore",
    "run_bench",
    "run_eval",
    "write_report",
]
_MODULES = {"BenchReport": "bench", "run_bench": "bench", "BenchConfig": "config", "EvalConfig": "config"}
_MODULES |= dict.fromkeys(("EvalPrompt", "choose_prompts", "read_passages", "read_prompts"), "prompts")
_MODULES |= {"write_report": "report", "rescore": "run", "run_eval": "run", "EvalReport": "tables"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
