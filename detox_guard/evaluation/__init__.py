"""Does steering work on your model? How toxic, how fluent and how fast its text is, plain, steered and guarded.

Nothing here is needed to serve.
"""

from __future__ import annotations

from detox_guard.evaluation.bench import BenchReport, run_bench
from detox_guard.evaluation.harness import rescore, run_eval
from detox_guard.evaluation.judges import load_judge
from detox_guard.evaluation.prompts import EvalPrompt, choose_prompts, read_passages, read_prompts
from detox_guard.evaluation.report import write_report
from detox_guard.evaluation.results import EvalReport

__all__ = [
    "BenchReport",
    "EvalPrompt",
    "EvalReport",
    "choose_prompts",
    "load_judge",
    "read_passages",
    "read_prompts",
    "rescore",
    "run_bench",
    "run_eval",
    "write_report",
]
