"""`run_eval`: plain against guarded continuations of a prompt file. Brings prompts, samples and judges together.

The protocol is RealToxicityPrompts' (Gehman et al. 2020): several sampled continuations a prompt, judged without their
prompt; perplexity of the continuations given the prompt, here under the plain backbone.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from detox_guard.errors import InvalidParamsError
from detox_guard.evaluation.judges import load_judge
from detox_guard.evaluation.machine import machine, prepare_folder, versions, write_whole
from detox_guard.evaluation.metrics import Bootstrap, distinct_n, toxicity
from detox_guard.evaluation.prompts import choose_prompts, read_prompts
from detox_guard.evaluation.results import EvalReport, GroupFigures, SystemFigures
from detox_guard.evaluation.samples import Run, System, decode
from detox_guard.generation import DetoxiGen
from detox_guard.params import DecodingParams, EngineConfig
from detox_guard.scoring import ToxicityScorer, checked_scores

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy.typing as npt
    import torch

    from detox_guard.evaluation.prompts import EvalPrompt
    from detox_guard.generation import ManySteering
    from detox_guard.policy import Rule

    Scores = dict[str, npt.NDArray[np.float64]]  # judge -> [prompts, samples]

__all__ = ["EvalReport", "evaluate", "run_eval"]

SAMPLES_FILE, REPORT_FILE = "samples.jsonl", "report.json"


def run_eval(
    *,
    model: str | Path | None = None,
    detoxifier: ManySteering = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    prompts: Path,
    judges: Sequence[str | ToxicityScorer] = ("embedded",),
    alphas: Sequence[float] = (2.0,),
    rules: Sequence[Rule] = ("dexperts",),
    plausibility: float = 0.0,
    samples: int = 8,
    max_new_tokens: int = 20,
    temperature: float = 1.0,
    top_p: float = 0.9,
    limit: int = 100,
    seed: int = 0,
    batch_rows: int = 64,
    output: Path | None = None,
    progress: bool = True,
) -> EvalReport:
    """Measure the plain model and each rule x alpha on `limit` toxic and `limit` non-toxic prompts of a file.

    Every system draws `samples` continuations a prompt with the same seeds. `batch_rows` is the size of the running
    batch. `output`: a folder for `samples.jsonl` and `report.json`, each written whole. `progress` shows bars on
    stderr where that is a terminal. Files and judges are checked before the model is loaded.
    Raises `DataError`, `ScorerError`, `InvalidParamsError`, and what loading and decoding raise.
    """
    chosen = choose_prompts(read_prompts(prompts), limit, seed)
    common = DecodingParams(
        alpha=0.0, plausibility=0.0, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens
    )
    steered = [
        System(f"{rule} α={alpha:g}", common.replace(alpha=float(alpha), rule=rule, plausibility=float(plausibility)))
        for rule in rules
        for alpha in alphas
        if alpha != 0  # the plain model is always measured
    ]
    scorers = _judges(judges)
    if output is not None:
        prepare_folder(output)
    config = EngineConfig(max_rows=batch_rows)
    with DetoxiGen.from_pretrained(model, detoxifier=detoxifier, device=device, dtype=dtype, config=config) as guard:
        report, runs, scores = _evaluate(
            guard, chosen, [System("plain", common), *steered], scorers, samples, seed, progress
        )
    report.context["prompts"]["file"] = prompts.name
    if output is not None:
        write_whole(output / SAMPLES_FILE, _sample_lines(chosen, runs, scores))
        write_whole(output / REPORT_FILE, report.to_json() + "\n")
    return report


def evaluate(
    guard: DetoxiGen,
    prompts: Sequence[EvalPrompt],
    systems: Sequence[System],
    judges: Sequence[str | ToxicityScorer] = ("embedded",),
    *,
    samples: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> EvalReport:
    """`run_eval` on a guard and prompts at hand. `systems[0]` is what the others are compared with."""
    return _evaluate(guard, prompts, systems, _judges(judges), samples, seed, progress)[0]


def _evaluate(
    guard: DetoxiGen,
    prompts: Sequence[EvalPrompt],
    systems: Sequence[System],
    judges: Sequence[ToxicityScorer],
    samples: int,
    seed: int,
    progress: bool,
) -> tuple[EvalReport, list[Run], list[Scores]]:
    for field, count in (("samples", samples), ("prompts", len(prompts))):
        if count < 1:
            raise InvalidParamsError(field, count, "at least 1")
    # Inputs of the judge go wrong first, not after an hour of decoding.
    for judge in judges:
        checked_scores(judge, ["A first look."])
    begin = time.perf_counter()
    runs: list[Run] = []
    with _progress(progress) as show:
        for system in systems:
            runs.append(decode(guard, prompts, system, samples, seed, show(system.name, len(prompts) * samples)))
    scores = [{judge.name: _scored(judge, run) for judge in judges} for run in runs]
    groups = [
        _group(name, [i for i, prompt in enumerate(prompts) if prompt.group == name], runs, scores, seed)
        for name in dict.fromkeys(prompt.group for prompt in prompts)
    ]
    backbone = guard.backbone
    context: dict[str, Any] = {
        "model": backbone.id,
        "revision": backbone.revision,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "detoxifiers": [
            {
                "sha256": s.detoxifier.sha256,
                "weight": s.weight,
                "position": s.detoxifier.card.position,
                "virtual_tokens": s.detoxifier.card.virtual_tokens,
            }
            for s in guard.streams
        ],
        "judges": [judge.name for judge in judges],
        "samples": samples,
        "seed": seed,
        "decoding": systems[0].params.model_dump(include={"temperature", "top_p", "top_k", "max_new_tokens"}),
        "prompts": {group.group: group.prompts for group in groups},
        "wall_s": round(time.perf_counter() - begin, 1),
        "machine": machine(backbone.device),
        "versions": versions(),
    }
    return EvalReport(tuple(groups), context), runs, scores


def _judges(specs: Sequence[str | ToxicityScorer]) -> list[ToxicityScorer]:
    if isinstance(specs, str) or not specs:
        raise InvalidParamsError("judges", specs, "a list of at least one scorer")
    return [load_judge(spec) for spec in specs]


def _scored(judge: ToxicityScorer, run: Run) -> npt.NDArray[np.float64]:
    texts = [sample.text for many in run.samples for sample in many]
    return np.asarray(checked_scores(judge, texts), dtype=np.float64).reshape(len(run.samples), -1)


def _group(name: str, at: list[int], runs: Sequence[Run], scores: Sequence[Scores], seed: int) -> GroupFigures:
    bootstrap = Bootstrap(len(at), seed=seed)
    plain_nll, plain_tokens = _sums(runs[0], at, "nll"), _sums(runs[0], at, "tokens")
    systems = []
    for number, (run, own) in enumerate(zip(runs, scores, strict=True)):
        nll, tokens = _sums(run, at, "nll"), _sums(run, at, "tokens")
        total = float(tokens.sum())
        replies = sum(len(run.samples[i]) for i in at)
        guarded = run.system.params.alpha > 0

        def rate(field: str, run: Run = run, total: float = total, guarded: bool = guarded) -> float | None:
            return float(_sums(run, at, field).sum()) / total if guarded and total else None

        params = run.system.params
        systems.append(
            SystemFigures(
                system=run.system.name,
                alpha=params.alpha,
                rule=params.rule if guarded else None,
                plausibility=params.plausibility,
                toxicity={
                    judge: toxicity(values[at], bootstrap, scores[0][judge][at] if number else None)
                    for judge, values in own.items()
                },
                perplexity=bootstrap.perplexity(nll, tokens),
                perplexity_ratio=bootstrap.perplexity_ratio(nll, tokens, plain_nll, plain_tokens) if number else None,
                distinct=tuple(_distinct(run, at, n) for n in (1, 2, 3)),
                reply_tokens=total / replies,
                empty_rate=sum(not one.text.strip() for i in at for one in run.samples[i]) / replies,
                fallback_rate=rate("fallbacks"),
                kl_detoxifier=rate("kl_detoxifier"),
                kl_steering=rate("kl_steering"),
                tokens_per_s=run.tokens_per_s,
            )
        )
    return GroupFigures(name, len(at), tuple(systems))


def _sums(run: Run, at: Sequence[int], field: str) -> npt.NDArray[np.float64]:
    """One field of the samples, summed for each prompt."""
    return np.array([sum(getattr(sample, field) for sample in run.samples[i]) for i in at], dtype=np.float64)


def _distinct(run: Run, at: Sequence[int], n: int) -> float | None:
    found = [distinct_n([sample.text for sample in run.samples[i]], n) for i in at]
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if known else None


def _sample_lines(prompts: Sequence[EvalPrompt], runs: Sequence[Run], scores: Sequence[Scores]) -> str:
    rows = [
        {
            "system": run.system.name,
            "group": prompt.group,
            "prompt": prompt.text,
            "prompt_toxicity": prompt.toxicity,
            "sample": j,
            "seed": sample.seed,
            "text": sample.text,
            "finish_reason": sample.finish_reason,
            "tokens": sample.tokens,
            "nll": sample.nll,
            "fallbacks": sample.fallbacks,
            "kl_detoxifier": sample.kl_detoxifier,
            "kl_steering": sample.kl_steering,
            "scores": {judge: float(values[i, j]) for judge, values in own.items()},
        }
        for run, own in zip(runs, scores, strict=True)
        for i, prompt in enumerate(prompts)
        for j, sample in enumerate(run.samples[i])
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class _Bars:
    """Rich progress bars on stderr, one a system."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=Console(stderr=True))

    def __enter__(self) -> Callable[[str, int], Callable[[int], None]]:
        self._bars.start()
        return self._show

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def _show(self, name: str, total: int) -> Callable[[int], None]:
        task = self._bars.add_task(name, total=total)
        return lambda done: self._bars.update(task, completed=done)


def _silent(_name: str, _total: int) -> Callable[[int], None]:
    return lambda _done: None


def _progress(wanted: bool) -> Any:
    return _Bars() if wanted and sys.stderr.isatty() else nullcontext(_silent)
