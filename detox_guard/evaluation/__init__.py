"""Measuring: how toxic, how fluent and how fast guarded text is against plain text. Nothing here is needed to serve."""

from __future__ import annotations

from detox_guard.evaluation.ablation import AblationConfig, run_ablation
from detox_guard.evaluation.ablation_results import AblationReport
from detox_guard.evaluation.bench import BenchReport, run_bench
from detox_guard.evaluation.context import ContextKL, context_kl
from detox_guard.evaluation.harness import rescore, run_eval
from detox_guard.evaluation.judges import load_judge
from detox_guard.evaluation.prompts import EvalPrompt, choose_prompts, read_passages, read_prompts
from detox_guard.evaluation.report import write_report
from detox_guard.evaluation.results import EvalReport
from detox_guard.evaluation.utility import UtilityReport, run_utility

__all__ = [
    "AblationConfig",
    "AblationReport",
    "BenchReport",
    "ContextKL",
    "EvalPrompt",
    "EvalReport",
    "UtilityReport",
    "choose_prompts",
    "context_kl",
    "load_judge",
    "read_passages",
    "read_prompts",
    "rescore",
    "run_ablation",
    "run_bench",
    "run_eval",
    "run_utility",
    "write_report",
]
