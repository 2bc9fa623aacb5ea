"""What steering costs where nothing is toxic: answers, language modelling, harmless mentions of people. Knows tasks.

- XQuAD (Artetxe et al. 2020) through the chat template, greedy: exact match and F1 as SQuAD counts them.
- WikiText-2: loss of given text under the steered distribution, teacher forced, temperature 1, the whole vocabulary.
- BOLD (Dhamala et al. 2021) beginnings about religions, genders and the like: noise, refusals, and whether replies
  still speak of what was asked.

Plain and steered replies go through one engine's batch. Every task is a resumable run of the harness in a folder of its
own; the figures go to `utility.json`.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from detox_benchmarks.utility.tasks import answer_scores, harmless_words, refuses, steered_nats, stems
from detox_guard._files import read_text, write_whole
from detox_guard.detoxigen import DetoxiGen
from detox_guard.errors import DataError, InvalidParamsError, PromptTooLongError
from detox_guard.evaluation.harness import all_methods, collect, judge_run, open_run, stored_replies
from detox_guard.evaluation.journal import Journal
from detox_guard.evaluation.likelihood import BackboneJudge
from detox_guard.evaluation.machine import machine, versions
from detox_guard.evaluation.methods import Ingredients, make_methods
from detox_guard.evaluation.metrics import Bootstrap, Figure
from detox_guard.evaluation.progress import Progress
from detox_guard.evaluation.prompts import EvalPrompt, choose_prompts, read_prompts
from detox_guard.evaluation.results import shown
from detox_guard.scorers.base import load_scorer
from detox_guard.settings import DecodingParams, EngineConfig

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch
    from rich.console import RenderableType

    from detox_guard.detoxigen import ManySteering
    from detox_guard.evaluation.methods import Method

__all__ = ["UtilityReport", "run_utility"]

UTILITY_FILE = "utility.json"
SAME_STREAMS = (
    "plain", "default", "guard",
    "detoxigen", "detoxigen-floor", "dexperts", "dexperts-floor", "bounded", "bounded-guard",
)  # fmt: skip
QUESTION = "{context}\n\nQuestion: {question}\nAnswer with a few words from the text above, and nothing else."
ANSWER_TOKENS, BOLD_TOKENS = 32, 20
WINDOW = 256


@dataclass(frozen=True)
class UtilityReport:
    """What `run_utility` measured: `summary["tasks"][task][method][figure]`, figures as in an eval's summary."""

    summary: dict[str, Any]

    def to_json(self) -> str:
        """One line."""
        return json.dumps({"utility": self.summary}, ensure_ascii=False, allow_nan=False)

    def table(self) -> RenderableType:
        """A rich table for each task; in brackets 95 % intervals, below each figure its difference to plain."""
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table

        tables = []
        for task, methods in self.summary["tasks"].items():
            table = Table(title=f"{task} ({self.summary['sizes'][task]})", title_justify="left")
            for column in ("", *methods):
                table.add_column(escape(column), justify="right" if column else "left")
            for name in next(iter(methods.values())):
                cells = [
                    "\n".join(shown(figures[name][kind]) for kind in ("value", "difference") if figures[name][kind])
                    for figures in methods.values()
                ]
                table.add_row(*map(escape, [name, *cells]))
            tables.append(table)
        return Group(*tables)


def run_utility(
    *,
    output: Path,
    xquad: Path | None = None,
    wikitext: Path | None = None,
    bold: Sequence[Path] = (),
    model: str | Path | None = None,
    detoxifier: ManySteering = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    methods: Sequence[str] = ("default",),
    alphas: Sequence[float] = (2.0,),
    plausibility: float = 0.02,
    limit: int = 200,
    samples: int = 5,
    seed: int = 0,
    batch_rows: int = 64,
    progress: bool = True,
) -> UtilityReport:
    """Measure each task that a file is given for: up to `limit` questions, windows of text, and beginnings.

    `samples` continuations of each BOLD beginning. `methods`: those of `SAME_STREAMS`. The same call takes up a run
    that was cut off. Raises `DataError`, `InvalidParamsError`, and what loading and decoding raise.
    """
    for name in methods:
        if name not in SAME_STREAMS:
            raise InvalidParamsError("methods", name, f"one of {', '.join(SAME_STREAMS)}")
    for name, count in (("limit", limit), ("samples", samples)):
        if count < 1:
            raise InvalidParamsError(name, count, "at least 1")
    if xquad is None and wikitext is None and not bold:
        raise InvalidParamsError("xquad", None, "at least one file: of xquad, wikitext or bold")
    questions = _questions(xquad, limit, seed) if xquad is not None else []
    read = [prompt for path in bold for prompt in choose_prompts(read_prompts(path), limit, seed)]
    beginnings = [replace(prompt, classes=("all",)) for prompt in read]  # harmless ones, whatever a label says
    text = read_text(wikitext) if wikitext is not None else ""
    with ExitStack() as stack:
        stack.enter_context(open_run(output))
        config = EngineConfig(max_rows=batch_rows)
        guard = stack.enter_context(
            DetoxiGen.from_pretrained(model, detoxifier=detoxifier, device=device, dtype=dtype, config=config)
        )
        bars = stack.enter_context(Progress(progress))

        def made(**sampling: Any) -> list[Method]:
            default = DecodingParams(**sampling)
            plain = default.replace(alpha=0.0, plausibility=0.0)
            ingredients = Ingredients(guard.backbone, plain, default, guard.streams, plausibility=float(plausibility))
            return make_methods(methods, alphas, ingredients)

        tasks: dict[str, dict[str, Any]] = {}
        sizes: dict[str, int] = {}
        if questions:
            ways = made(temperature=0.0, max_new_tokens=ANSWER_TOKENS)
            tasks["xquad"] = _answers(output / "xquad", guard, ways, questions, seed, bars)
            sizes["xquad"] = len(questions)
        if text:
            ways = [way for way in made(top_p=1.0) if way.params.guard is None]
            windows = _windows(guard, text, limit, seed)
            tasks["wikitext"] = _losses(output / "wikitext", guard, ways, windows, seed, bars)
            sizes["wikitext"] = len(windows)
        if beginnings:
            ways = made(max_new_tokens=BOLD_TOKENS)
            tasks["bold"] = _mentions(output / "bold", guard, ways, beginnings, samples, seed, bars)
            sizes["bold"] = len(beginnings)
        summary = {
            **guard.backbone.identity,
            "methods": {way.name: way.identity() for way in made()},
            "seed": seed,
            "samples": samples,
            "sizes": sizes,
            "tasks": tasks,
            "machine": machine(guard.backbone.device),
            "versions": versions(),
        }
        write_whole(output / UTILITY_FILE, json.dumps(summary, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
    return UtilityReport(summary)


# -- answers


def _questions(path: Path, limit: int, seed: int) -> list[dict[str, Any]]:
    try:
        found = [
            {
                "text": QUESTION.format(context=paragraph["context"], question=one["question"]),
                "answers": [str(answer["text"]) for answer in one["answers"]],
            }
            for article in json.loads(read_text(path))["data"]
            for paragraph in article["paragraphs"]
            for one in paragraph["qas"]
        ]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: not in SQuAD's format ({type(error).__name__}: {error})") from error
    if not found:
        raise DataError(f"{path}: no question in it")
    return [found[i] for i in sorted(np.random.default_rng(seed).permutation(len(found))[:limit])]


def _answers(
    folder: Path,
    guard: DetoxiGen,
    methods: Sequence[Method],
    questions: Sequence[dict[str, Any]],
    seed: int,
    bars: Progress,
) -> dict[str, Any]:
    prompts = [EvalPrompt(one["text"], classes=("all",)) for one in questions]
    asked = {**_asked("xquad", prompts, 1, seed, chat=True), "answers": [one["answers"] for one in questions]}
    folder.mkdir(exist_ok=True)
    run = collect(folder, asked, guard.backbone, methods, guard.config, bars, guard)
    replies = stored_replies(folder, run)
    scores = {
        way.name: [answer_scores(replies[way.name, i][0]["text"], one["answers"]) for i, one in enumerate(questions)]
        for way in methods
    }
    return _figures(
        {
            name: {"exact match": [em for em, _ in pairs], "F1": [f1 for _, f1 in pairs]}
            for name, pairs in scores.items()
        },
        seed,
    )


# -- language modelling


def _windows(guard: DetoxiGen, text: str, limit: int, seed: int) -> list[list[int]]:
    backbone = guard.backbone
    ids = list(backbone.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    asked = WINDOW + max((stream.detoxifier.card.virtual_tokens for stream in guard.streams), default=0)
    bounds = [bound for bound in (backbone.max_positions, backbone.window) if bound is not None]
    if bounds and asked > min(bounds):
        raise PromptTooLongError("wikitext", f"{asked} positions", f"at most {min(bounds)} positions")
    windows = [ids[at : at + WINDOW] for at in range(0, len(ids) - WINDOW + 1, WINDOW)]
    if not windows:
        raise DataError(f"wikitext: {len(ids)} tokens of text, at least {WINDOW} are needed")
    return [windows[i] for i in sorted(np.random.default_rng(seed).permutation(len(windows))[:limit])]


def _losses(
    folder: Path, guard: DetoxiGen, methods: Sequence[Method], windows: Sequence[list[int]], seed: int, bars: Progress
) -> dict[str, Any]:
    """Windows of 256 tokens: the second half given the first."""
    folder.mkdir(exist_ok=True)
    backbone = guard.backbone
    about = {"windows": windows, **backbone.identity}
    known = all_methods(folder / "run.json", about, methods)
    write_whole(folder / "run.json", json.dumps({**about, "methods": known}) + "\n")
    half = WINDOW // 2
    with Journal(folder / "losses.jsonl", ("method", "window")) as journal:
        missing = {i: [way for way in methods if (way.name, i) not in journal] for i in range(len(windows))}
        with bars.stage("wikitext", len(windows), sum(not ways for ways in missing.values())) as stage:
            for i, ways in missing.items():
                if not ways:
                    continue
                pairs = steered_nats(backbone, ways, windows[i][:half], windows[i][half:])
                for way, (nats, never) in zip(ways, pairs, strict=True):
                    journal.add({"method": way.name, "window": i, "nats": nats, "never": never})
                stage.tick()
        journal.finish()
        rows = {way.name: [journal.rows[way.name, i] for i in range(len(windows))] for way in methods}
    tokens = WINDOW - half - 1
    return _figures(
        {
            name: {
                "nats a token": [row["nats"] / tokens for row in own],
                "forbidden": [row["never"] / tokens for row in own],
            }
            for name, own in rows.items()
        },
        seed,
    )


# -- harmless mentions


def _mentions(
    folder: Path,
    guard: DetoxiGen,
    methods: Sequence[Method],
    prompts: Sequence[EvalPrompt],
    samples: int,
    seed: int,
    bars: Progress,
) -> dict[str, Any]:
    """Noise as the harness counts it; `refusals`; `on topic`: replies that take up a content word of the prompt or its
    category; `content words`: distinct harmless ones a reply."""
    folder.mkdir(exist_ok=True)
    asked = _asked("bold", prompts, samples, seed, chat=False)
    run = collect(folder, asked, guard.backbone, methods, guard.config, bars, guard)
    summary = judge_run(folder, run, [load_scorer()], [BackboneJudge(guard.backbone)], bars).summary
    group = next(group for group in summary["groups"] if group["name"] == "all")["methods"]
    replies = stored_replies(folder, run)
    own: dict[str, dict[str, list[float]]] = {}
    for way in methods:
        columns: dict[str, list[float]] = {"refusals": [], "on topic": [], "content words": []}
        for i, prompt in enumerate(prompts):
            topic = stems(" ".join([prompt.text, *prompt.categories]))
            texts = [row["text"] for row in replies[way.name, i]]
            columns["refusals"].append(_mean([refuses(text) for text in texts]))
            columns["on topic"].append(_mean([bool(topic & stems(text)) for text in texts]))
            columns["content words"].append(_mean([len(harmless_words(text)) for text in texts]))
        own[way.name] = columns
    kept = ("degenerate", "empty", "tokens", "embedded:expected_max", "backbone:perplexity")
    return {
        name: {**figures, **{one: group[name][one] for one in kept}} for name, figures in _figures(own, seed).items()
    }


# -- common


def _asked(task: str, prompts: Sequence[EvalPrompt], samples: int, seed: int, *, chat: bool) -> dict[str, Any]:
    return {
        "source": {"name": task, "chat": chat},
        "samples": samples,
        "seed": seed,
        "passages": [],
        "prompts": [asdict(prompt) for prompt in prompts],
    }


def _figures(columns: Mapping[str, Mapping[str, Sequence[float]]], seed: int) -> dict[str, Any]:
    """Means over prompts with intervals, against those of the first method; `columns[method][figure][prompt]`."""
    plain, *_ = columns.values()
    bootstrap = Bootstrap(len(next(iter(plain.values()))), seed=seed)

    def figure(name: str, values: Sequence[float], own: bool) -> Figure:
        return bootstrap.figure(bootstrap.rate(values), None if own else bootstrap.rate(plain[name]))

    return {
        method: {name: asdict(figure(name, values, figures is plain)) for name, values in figures.items()}
        for method, figures in columns.items()
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
