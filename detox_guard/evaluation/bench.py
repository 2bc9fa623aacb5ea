"""Speed of steered and of guarded decoding against the plain model, as medians of ratios of neighbouring runs.

Times what a user sees: from the call to the chunks of a stream. Knows clocks; knows no quality.
"""

from __future__ import annotations

import itertools
import json
import statistics
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from detox_guard.detoxifiers.card import DetoxifierCard
from detox_guard.detoxifiers.resolve import as_streams
from detox_guard.detoxifiers.soft_prompt import Detoxifier
from detox_guard.detoxigen import DetoxiGen
from detox_guard.errors import EngineError
from detox_guard.evaluation.config import BenchConfig
from detox_guard.evaluation.machine import machine, peak_memory_mib, versions
from detox_guard.evaluation.tables import Sheet, rich_tables
from detox_guard.models.backbone import Backbone
from detox_guard.models.load import load_backbone
from detox_guard.settings import DecodingParams, GuardPolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rich.console import RenderableType

__all__ = ["RATIOS", "BenchReport", "Timed", "Ways", "all_of", "figures", "random_detoxifier", "run_bench", "ways_of"]

MOST = 0.999
"""A threshold that lets all through."""
PROMPT = "The people who live in the house next to ours have never once"


@dataclass(frozen=True)
class Bar:
    """A ratio and what it should reach."""

    value: float
    bound: float
    at_most: bool

    @property
    def met(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound


@dataclass
class BenchReport:
    """`timings`: one a way of decoding; `ratios`: medians over runs; `about`: machine, versions, settings."""

    timings: dict[str, dict[str, float]]
    ratios: dict[str, Bar]
    about: dict[str, Any]

    def table(self) -> RenderableType:
        """For a terminal."""
        facts = self.about["machine"]
        keys = ("ms_per_token", "tokens_per_s", "ttft_ms", "p50_ms", "p95_ms")
        times = Sheet(
            f"{self.about['backbone']}, {self.about['dtype']}, {facts['cpu']}",
            ["", "ms/token", "tokens/s", "first text ms", "between p50 ms", "p95 ms"],
            [
                [name, *(f"{found[key]:.1f}" if key in found else "" for key in keys)]
                for name, found in self.timings.items()
            ],
        )
        ratios = [
            [name, f"{bar.value:.2f}×", f"{'at most' if bar.at_most else 'at least'} {bar.bound:g}", verdict]
            for name, bar in self.ratios.items()
            for verdict in ["met" if bar.met else "missed"]
        ]
        return rich_tables(
            [times, Sheet("Ratios of neighbouring runs", ["", "ratio", "aim", ""], ratios)],
            f"{facts['threads']} threads, {facts['capability']}; peak {self.about['peak_mib'] or 0:.0f} MiB; "
            f"{self.about['tokens']} tokens, {self.about['runs']} runs",
        )

    def to_json(self) -> str:
        """One line."""
        ratios = {
            name: {"value": round(bar.value, 3), "bound": bar.bound, "met": bar.met}
            for name, bar in self.ratios.items()
        }
        return json.dumps({"timings": self.timings, "ratios": ratios, "about": self.about}, ensure_ascii=False)


@dataclass
class Timed:
    """One timed reply, or several at once."""

    wall_s: float
    tokens: int
    first_s: float = float("nan")
    gaps_s: list[float] = field(default_factory=list)

    @property
    def per_token(self) -> float:
        return self.wall_s / self.tokens


Ways = dict[str, "Callable[[], Timed]"]
Ratio = tuple[str, str, float, bool]
RATIOS: dict[str, Ratio] = {
    "steered / plain": ("engine, steered", "engine, plain", 1.15, True),
    "guarded / steered": ("engine, guarded", "engine, steered", 1.1, True),
    "guarded / plain": ("engine, guarded", "engine, plain", 1.27, True),
    "many steered streams over one": ("engine, steered", "engine, steered, many", 4.5, False),
    "long context, first token, steered / plain": ("long context, steered", "long context, plain", 1.2, True),
    "first token, a chat's second turn / anew": ("second turn, steered", "long context, steered", 0.3, True),
}
"""Over, under, the bound, and whether it is the most; of times a token, or to the first one."""
FIRST_TOKEN = ("long context", "second turn")
"""Ways whose ratios are of the time to the first token."""


def run_bench(
    *,
    beside: Callable[[int], Ways] = lambda _: {},
    ratios: Mapping[str, Ratio] = RATIOS,
    **fields: Any,
) -> BenchReport:
    """Time our engine plain, steered and guarded, one reply and several at once, behind a long context, and in a chat
    that goes on; `fields` are those of `BenchConfig`.

    *Steered* is alpha 3 without a guard; *guarded* is the same under a `GuardPolicy` whose scorer lets everything
    through, so that what is timed is scoring and waiting, and no reply is decoded twice. Its first text is the first
    sentence, released. Replies are greedy, and end
    tokens ignored. A round times every way once, so that a ratio compares neighbours.

    `beside` gives more ways to time, from the tokens of a reply, and `ratios` what is told of them.
    Raises `InvalidParamsError`, and what loading and decoding raise.
    """
    config = BenchConfig(**fields).sized()
    tokens, context, runs, streams = config.tokens, config.context, config.runs, config.streams
    ours, detoxifier = config.model, config.detoxifier
    if not isinstance(ours, Backbone):
        ours = load_backbone(config.model, **config.loading)
    is_random = detoxifier == "random"
    with DetoxiGen(ours, as_streams(random_detoxifier(ours) if is_random else detoxifier, ours)) as model:
        ways = {**ways_of(model, tokens, context, streams), **beside(tokens)}
        for way in ways.values():
            way()
        rounds = [{name: way() for name, way in ways.items()} for _ in range(runs)]
        about = {
            "machine": machine(ours.device),
            "versions": versions(),
            "backbone": ours.id,
            **{name: value for name, value in ours.identity.items() if name != "model"},
            "detoxifier": ["random" if is_random else s.detoxifier.sha256 for s in model.streams],
            "position": [s.place for s in model.streams],
            "tokens": tokens,
            "context": context,
            "runs": runs,
            "streams": streams,
            "peak_mib": peak_memory_mib(ours.device),
        }
    timings = {name: figures([found[name] for found in rounds]) for name in ways}
    return BenchReport(timings, {name: _ratio(rounds, *ratio) for name, ratio in ratios.items()}, about)


def random_detoxifier(backbone: Backbone, *, virtual_tokens: int = 20, seed: int = 0) -> Detoxifier:
    """A soft prompt of random numbers, as large as the backbone's embeddings, before the reply. It costs what a trained
    one costs, and steers nowhere."""
    import torch

    if backbone.gguf is not None:
        from detox_guard.models.gguf_probe import embeddings

        size = float(embeddings(str(backbone.gguf.path), 0, 512).std())
    else:
        size = float(backbone.model.get_input_embeddings().weight[:512].float().std())
    generator = torch.Generator().manual_seed(seed)
    card = DetoxifierCard(
        base_id=backbone.id,
        hidden_size=backbone.hidden_size,
        num_layers=backbone.num_layers,
        virtual_tokens=virtual_tokens,
        position="reply",
        notes="random numbers, for timing",
    )
    return Detoxifier(torch.randn(virtual_tokens, backbone.hidden_size, generator=generator) * size, card)


def ways_of(model: DetoxiGen, tokens: int, context: int, streams: int) -> Ways:
    """What a bench times of one model."""
    greedy = DecodingParams(calm_share=1, temperature=0.0, max_new_tokens=tokens, ignore_eos=True, seed=0)
    off = greedy.replace(alpha=0.0)
    guarded = greedy.replace(guard=GuardPolicy(threshold=MOST))
    one = greedy.replace(max_new_tokens=1)
    words = model.backbone.tokenizer(PROMPT)["input_ids"]
    turns = itertools.count()

    def fresh() -> str:
        """A long prompt that begins as none before did: what is alike would not be computed again."""
        tokenizer, turn = model.backbone.tokenizer, next(turns)
        ids = tokenizer(f"w{turn + 2} ")["input_ids"] + words * (context // len(words) + 1)
        return str(model.backbone.tokenizer.decode(ids[:context]))

    def second_turn() -> Timed:
        """A long context and a question behind it: the context was asked before."""
        first = fresh()
        _stream(model, first, one)
        return _stream(model, f"{first}. {PROMPT}", one)

    return {
        "engine, plain": lambda: _stream(model, PROMPT, off),
        "engine, steered": lambda: _stream(model, PROMPT, greedy),
        "engine, guarded": lambda: _stream(model, PROMPT, guarded),
        "engine, steered, many": lambda: _many(model, greedy, streams),
        "long context, plain": lambda: _stream(model, fresh(), one.replace(alpha=0.0)),
        "long context, steered": lambda: _stream(model, fresh(), one),
        "second turn, steered": second_turn,
    }


def _stream(model: DetoxiGen, prompt: str, params: DecodingParams) -> Timed:
    started = time.perf_counter()
    times = []
    count = 0
    for chunk in model.stream(prompt, params):
        if chunk.generation is None:
            times.append(time.perf_counter())
        else:
            count = chunk.generation.usage.completion_tokens
    ended = time.perf_counter()
    first = (times[0] if times else ended) - started
    return Timed(
        ended - started, all_of(count, params.max_new_tokens), first, [b - a for a, b in itertools.pairwise(times)]
    )


def all_of(got: int, asked: int) -> int:
    """A run that ended early cannot be compared with one that did not."""
    if got != asked:
        raise EngineError(f"a timed run gave {got} tokens instead of {asked}")
    return got


def _many(model: DetoxiGen, params: DecodingParams, streams: int) -> Timed:
    results: list[Timed] = []
    threads = [
        threading.Thread(target=lambda: results.append(_stream(model, PROMPT, params)), daemon=True)
        for _ in range(streams)
    ]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall_s = time.perf_counter() - started
    if len(results) != streams:
        raise RuntimeError(f"{streams - len(results)} of {streams} streams failed")
    gaps = [gap for run in results for gap in run.gaps_s]
    return Timed(wall_s, sum(run.tokens for run in results), max(run.first_s for run in results), gaps)


def figures(runs: list[Timed]) -> dict[str, float]:
    """Medians over the runs: milliseconds a token, tokens a second, to the first token and between two."""
    figures = {
        "ms_per_token": 1e3 * statistics.median(run.per_token for run in runs),
        "tokens_per_s": statistics.median(1 / run.per_token for run in runs),
    }
    first = statistics.median(run.first_s for run in runs)
    if first == first:
        figures["ttft_ms"] = 1e3 * first
    gaps = sorted(gap for run in runs for gap in run.gaps_s)
    if gaps:
        figures["p50_ms"] = 1e3 * gaps[len(gaps) // 2]
        figures["p95_ms"] = 1e3 * gaps[min(len(gaps) - 1, len(gaps) * 95 // 100)]
    return {name: round(value, 2) for name, value in figures.items()}


def _ratio(rounds: list[dict[str, Timed]], over: str, under: str, bound: float, at_most: bool) -> Bar:
    def time_of(run: Timed) -> float:
        return run.first_s if over.startswith(FIRST_TOKEN) else run.per_token

    return Bar(statistics.median(time_of(found[over]) / time_of(found[under]) for found in rounds), bound, at_most)
