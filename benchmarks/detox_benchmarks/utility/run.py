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
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field, field_validator

from detox_benchmarks.methods import more_methods
from detox_benchmarks.utility.tasks import answer_scores, harmless_words, refuses, steered_nats, stems
from detox_guard._files import read_text, write_whole
from detox_guard._progress import Progress
from detox_guard._strict import StrictModel
from detox_guard.detoxigen import DetoxiGen
from detox_guard.errors import DataError, InvalidParamsError, PromptTooLongError
from detox_guard.evaluation.lms import LMJudge
from detox_guard.evaluation.machine import machine, versions
from detox_guard.evaluation.methods import Ingredients, make_methods, needs_streams
from detox_guard.evaluation.metrics import Bootstrap, Figure
from detox_guard.evaluation.prompts import EvalPrompt, choose_prompts, read_prompts, read_squad
from detox_guard.evaluation.run import collect, judge_run
from detox_guard.evaluation.store import Journal, all_methods, open_run, stored_replies
from detox_guard.evaluation.tables import Sheet, rich_tables, shown
from detox_guard.scorers.base import load_scorer
from detox_guard.settings import DecodingParams, EngineConfig

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import RenderableType

    from detox_guard.evaluation.methods import Method

__all__ = ["UtilityConfig", "UtilityReport", "run_utility"]

UTILITY_FILE = "utility.json"
SAME_STREAMS = (
    "plain", "default", "guard",
    "detoxigen", "detoxigen-floor", "dexperts", "dexperts-floor", "bounded", "bounded-guard",
)  # fmt: skip
QUESTION = "{context}\n\nQuestion: {question}\nAnswer with a few words from the text above, and nothing else."
ANSWER_TOKENS, BOLD_TOKENS = 32, 20
WINDOW = 256


class UtilityConfig(StrictModel):
    """What `run_utility` measures, and how. Raises `InvalidParamsError`."""

    output: str
    """Folder of the run; a run cut off is taken up there."""
    xquad: str | None = None
    """Questions in SQuAD's format, .json."""
    wikitext: str | None = None
    """Plain text, .txt."""
    bold: tuple[str, ...] = ()
    """Harmless beginnings, BOLD's .json."""
    model: str | None = None
    """Hub id, folder or .gguf file; else the embedded default model."""
    detoxifier: Any = None
    """Folder or hub id; else the shipped one."""
    device: str | None = None
    """cpu, cuda, cuda:N, mps; else the best there is."""
    dtype: str | None = None
    """Number type of the weights; else what the device does best."""
    methods: tuple[str, ...] = ("default",)
    """As in eval, of one soft prompt."""
    alphas: tuple[float, ...] = (2.0,)
    """A strength, for each method whose strength is free."""
    plausibility: float = 0.02
    """The floor of the methods that have one."""
    limit: Annotated[int, Field(ge=1)] = 200
    """Questions, windows and beginnings."""
    samples: Annotated[int, Field(ge=1)] = 5
    """Replies a beginning."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of what is drawn and of the replies."""
    batch_rows: Annotated[int, Field(ge=2)] = 64
    """Rows of the running batch."""

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: object) -> object:
        """Paths as names, lists as tuples."""
        if isinstance(value, list | tuple):
            return tuple(str(one) if isinstance(one, Path) else one for one in value)
        return str(value) if isinstance(value, Path) else value


@dataclass(frozen=True)
class UtilityReport:
    """What `run_utility` measured: `summary["tasks"][task][method][figure]`, figures as in an eval's summary."""

    summary: dict[str, Any]

    def to_json(self) -> str:
        """One line."""
        return json.dumps({"utility": self.summary}, ensure_ascii=False, allow_nan=False)

    def table(self) -> RenderableType:
        """A rich table for each task; in brackets 95 % intervals, below each figure its difference to plain."""
        sheets = []
        for task, methods in self.summary["tasks"].items():
            rows = []
            for name in next(iter(methods.values())):
                figures = [found[name] for found in methods.values()]
                kinds = ("value", "difference")
                rows.append([name, *("\n".join(shown(one[kind]) for kind in kinds if one[kind]) for one in figures)])
            sheets.append(Sheet(f"{task} ({self.summary['sizes'][task]})", ["", *methods], rows))
        return rich_tables(sheets)


def run_utility(*, progress: bool = True, **fields: Any) -> UtilityReport:
    """Measure each task that a file is given for: up to `limit` questions, windows of text, and beginnings.

    `fields` are those of `UtilityConfig`. The same call takes up a run that was cut off. Raises `DataError`,
    `InvalidParamsError`, and what loading and decoding raise.
    """
    config = UtilityConfig(**fields)
    limit, samples, seed, output = config.limit, config.samples, config.seed, Path(config.output)
    table = {name: recipe for name, recipe in more_methods(config.plausibility).items() if name in SAME_STREAMS}
    needs_streams(config.methods, table)
    if not (config.xquad or config.wikitext or config.bold):
        raise InvalidParamsError("xquad", None, "at least one file: of xquad, wikitext or bold")
    questions = _questions(Path(config.xquad), limit, seed) if config.xquad else []
    read = [prompt for path in config.bold for prompt in choose_prompts(read_prompts(path), limit, seed)]
    beginnings = [replace(prompt, classes=("all",)) for prompt in read]  # harmless ones, whatever a label says
    text = read_text(Path(config.wikitext)) if config.wikitext else ""
    with ExitStack() as stack:
        stack.enter_context(open_run(output))
        model = stack.enter_context(
            DetoxiGen.from_pretrained(
                config.model,
                detoxifier=config.detoxifier,
                device=config.device,
                dtype=config.dtype,
                config=EngineConfig(max_rows=config.batch_rows),
            )
        )
        bars = stack.enter_context(Progress(progress))

        def made(**sampling: Any) -> list[Method]:
            default = DecodingParams(**sampling)
            plain = default.replace(alpha=0.0, plausibility=0.0)
            return make_methods(
                config.methods, config.alphas, Ingredients(model.backbone, plain, default, model.streams), table
            )

        tasks: dict[str, dict[str, Any]] = {}
        sizes: dict[str, int] = {}
        if questions:
            ways = made(temperature=0.0, max_new_tokens=ANSWER_TOKENS)
            tasks["xquad"] = _answers(output / "xquad", model, ways, questions, seed, bars)
            sizes["xquad"] = len(questions)
        if text:
            ways = [way for way in made(top_p=1.0) if way.params.guard is None]
            windows = _windows(model, text, limit, seed)
            tasks["wikitext"] = _losses(output / "wikitext", model, ways, windows, seed, bars)
            sizes["wikitext"] = len(windows)
        if beginnings:
            ways = made(max_new_tokens=BOLD_TOKENS)
            tasks["bold"] = _mentions(output / "bold", model, ways, beginnings, samples, seed, bars)
            sizes["bold"] = len(beginnings)
        summary = {
            **model.backbone.identity,
            "methods": {way.name: way.identity() for way in made()},
            "seed": seed,
            "samples": samples,
            "sizes": sizes,
            "tasks": tasks,
            "machine": machine(model.backbone.device),
            "versions": versions(),
        }
        write_whole(output / UTILITY_FILE, json.dumps(summary, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
    return UtilityReport(summary)


# -- answers


def _questions(path: Path, limit: int, seed: int) -> list[dict[str, Any]]:
    found = [
        {
            "text": QUESTION.format(context=paragraph["context"], question=one["question"]),
            "answers": [str(answer["text"]) for answer in one["answers"]],
        }
        for paragraph in read_squad(path)
        for one in paragraph.get("qas", ())
    ]
    if not found:
        raise DataError(f"{path}: no question in it")
    return [found[i] for i in sorted(np.random.default_rng(seed).permutation(len(found))[:limit])]


def _answers(
    folder: Path,
    model: DetoxiGen,
    methods: Sequence[Method],
    questions: Sequence[dict[str, Any]],
    seed: int,
    bars: Progress,
) -> dict[str, Any]:
    prompts = [EvalPrompt(one["text"], classes=("all",)) for one in questions]
    asked = {**_asked("xquad", prompts, 1, seed, chat=True), "answers": [one["answers"] for one in questions]}
    folder.mkdir(exist_ok=True)
    run = collect(folder, asked, model.backbone, methods, model.config, bars, model)
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


def _windows(model: DetoxiGen, text: str, limit: int, seed: int) -> list[list[int]]:
    backbone = model.backbone
    ids = list(backbone.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    asked = WINDOW + max((stream.soft_prompt.card.virtual_tokens for stream in model.streams), default=0)
    bounds = [bound for bound in (backbone.max_positions, backbone.window) if bound is not None]
    if bounds and asked > min(bounds):
        raise PromptTooLongError("wikitext", f"{asked} positions", f"at most {min(bounds)} positions")
    windows = [ids[at : at + WINDOW] for at in range(0, len(ids) - WINDOW + 1, WINDOW)]
    if not windows:
        raise DataError(f"wikitext: {len(ids)} tokens of text, at least {WINDOW} are needed")
    return [windows[i] for i in sorted(np.random.default_rng(seed).permutation(len(windows))[:limit])]


def _losses(
    folder: Path, model: DetoxiGen, methods: Sequence[Method], windows: Sequence[list[int]], seed: int, bars: Progress
) -> dict[str, Any]:
    """Windows of 256 tokens: the second half given the first."""
    folder.mkdir(exist_ok=True)
    backbone = model.backbone
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
    model: DetoxiGen,
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
    run = collect(folder, asked, model.backbone, methods, model.config, bars, model)
    summary = judge_run(folder, run, [load_scorer()], [LMJudge(model.backbone, own=True)], bars).summary
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
