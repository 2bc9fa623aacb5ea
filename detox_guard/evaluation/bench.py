"""Speed of steered and of guarded decoding against the plain model, as medians of ratios of neighbouring runs.

Times what a user sees: from the call to the chunks of a stream. Knows clocks; knows no quality. `generate` runs in a
process of its own, as in a program that does nothing else: two OpenMP teams in one process slow each other down.
"""

from __future__ import annotations

import itertools
import json
import statistics
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from detox_guard._threads import run_aside
from detox_guard.detoxifiers.soft_prompt import as_streams
from detox_guard.detoxigen import DetoxiGen
from detox_guard.errors import EngineError, InvalidParamsError
from detox_guard.evaluation.machine import machine, peak_memory_mib, versions
from detox_guard.evaluation.random_models import PREFIX, random_backbone, random_detoxifier
from detox_guard.models.load import load_backbone
from detox_guard.settings import DecodingParams, GuardPolicy

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

    from detox_guard.detoxifiers.soft_prompt import Detoxifier
    from detox_guard.models.backbone import Backbone

__all__ = ["BenchReport", "run_bench"]

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

    def table(self) -> Table:
        """For a terminal."""
        from rich.table import Table

        table = Table(title=f"{self.about['backbone']}, {self.about['dtype']}, {self.about['machine']['cpu']}")
        for name in ("", "ms/token", "tokens/s", "first token ms", "between p50 ms", "p95 ms"):
            table.add_column(name, justify="left" if not name else "right")
        for name, figures in self.timings.items():
            keys = ("ms_per_token", "tokens_per_s", "ttft_ms", "p50_ms", "p95_ms")
            table.add_row(name, *(f"{figures[key]:.1f}" if key in figures else "" for key in keys))
        table.add_section()
        for name, bar in self.ratios.items():
            aim = f"{'at most' if bar.at_most else 'at least'} {bar.bound:g}"
            table.add_row(name, f"{bar.value:.2f}×", aim, "met" if bar.met else "missed")
        facts = self.about["machine"]
        fast = ", ".join(name for name in ("avx512_bf16", "amx") if facts[name]) or "no avx512_bf16, no amx"
        table.caption = (
            f"{facts['threads']} threads, {fast}; peak {self.about['peak_mib'] or 0:.0f} MiB; "
            f"{self.about['tokens']} tokens, {self.about['runs']} runs"
        )
        return table

    def to_json(self) -> str:
        """One line."""
        ratios = {
            name: {"value": round(bar.value, 3), "bound": bar.bound, "met": bar.met}
            for name, bar in self.ratios.items()
        }
        return json.dumps({"timings": self.timings, "ratios": ratios, "about": self.about}, ensure_ascii=False)


@dataclass
class _Run:
    """One timed reply, or several at once."""

    wall_s: float
    tokens: int
    first_s: float = float("nan")
    gaps_s: list[float] = field(default_factory=list)

    @property
    def per_token(self) -> float:
        return self.wall_s / self.tokens


def run_bench(
    *,
    model: str | None = None,
    detoxifier: str | Detoxifier | None = None,
    device: str | None = None,
    dtype: str | None = None,
    tokens: int = 64,
    context: int = 600,
    runs: int = 5,
    streams: int = 8,
    quick: bool = False,
) -> BenchReport:
    """Time plain `generate`, `generate` with a guidance scale, and our engine plain, steered and guarded.

    *Steered* is alpha 3 without a guard; *guarded* is the same under a `GuardPolicy` whose scorer lets everything
    through, so that what is timed is scoring and waiting, and no reply is decoded twice.

    `tokens` a reply (greedy, end tokens ignored), `context` prompt tokens of the long-context case, `runs` rounds after
    one to warm up; a round times every way once, so that a ratio compares neighbours. `quick`: a fraction of the work.

    `model` "random-llama:135m", ":1b" or ":8b" has random weights of that shape, to time a GPU without a hub.
    `detoxifier` "random" costs what a trained one costs and steers nowhere; it is the default for random weights.
    Raises `InvalidParamsError`, and what loading and decoding raise.
    """
    for name, count, least in (
        ("tokens", tokens, 2),
        ("context", context, 1),
        ("runs", runs, 1),
        ("streams", streams, 1),
    ):
        if count < least:
            raise InvalidParamsError(name, count, f"at least {least}")
    if quick:
        tokens, context, runs, streams = min(tokens, 8), min(context, 40), min(runs, 2), min(streams, 3)
    ours = run_aside(lambda: _load(model, device, dtype))
    is_random = detoxifier == "random" or (detoxifier is None and bool(model) and str(model).startswith(PREFIX))
    with (
        ProcessPoolExecutor(1, get_context("spawn"), _start_plain, (model, device, dtype)) as plain,
        DetoxiGen(ours, as_streams(random_detoxifier(ours) if is_random else detoxifier, ours)) as guard,
    ):
        ways = _ways(plain, guard, tokens, context, streams)
        for way in ways.values():
            way()
        rounds = [{name: way() for name, way in ways.items()} for _ in range(runs)]
        about = {
            "machine": machine(ours.device),
            "versions": versions(),
            "backbone": ours.id,
            "dtype": ours.identity["dtype"],
            "detoxifier": ["random" if is_random else s.detoxifier.sha256 for s in guard.streams],
            "position": [s.detoxifier.card.position for s in guard.streams],
            "tokens": tokens,
            "context": context,
            "runs": runs,
            "streams": streams,
            "peak_mib": peak_memory_mib(ours.device),
        }
    return BenchReport({name: _figures([r[name] for r in rounds]) for name in ways}, _ratios(rounds), about)


def _load(model: str | None, device: str | None, dtype: str | None) -> Backbone:
    if model is not None and str(model).startswith(PREFIX):
        return random_backbone(str(model), device=device, dtype=dtype)
    return load_backbone(model, device=device, dtype=dtype)


_plain: Backbone
"""The backbone of the process that times `generate`; unset elsewhere."""


def _start_plain(model: str | None, device: str | None, dtype: str | None) -> None:
    global _plain
    _plain = _load(model, device, dtype)


def _ways(
    plain: ProcessPoolExecutor, guard: DetoxiGen, tokens: int, context: int, streams: int
) -> dict[str, Callable[[], _Run]]:
    greedy = DecodingParams(calm_share=1, temperature=0.0, max_new_tokens=tokens, ignore_eos=True, seed=0)
    off = greedy.replace(alpha=0.0)
    guarded = greedy.replace(guard=GuardPolicy(threshold=MOST))
    one = greedy.replace(max_new_tokens=1)
    words = guard.backbone.tokenizer(PROMPT)["input_ids"]
    turns = itertools.count()

    def fresh() -> str:
        """A long prompt that was not asked before: an equal one would not be computed again."""
        tokenizer, turn = guard.backbone.tokenizer, next(turns)
        # A random shape knows the words w2, w3, … only; the same of another tokenizer are text like any.
        ids = tokenizer(f"w{turn + 2} ")["input_ids"] + words * (context // len(words) + 1)
        return str(guard.backbone.tokenizer.decode(ids[:context]))

    return {
        "plain generate": lambda: plain.submit(_generate, tokens).result(),
        "engine, plain": lambda: _stream(guard, PROMPT, off),
        "engine, steered": lambda: _stream(guard, PROMPT, greedy),
        "engine, guarded": lambda: _stream(guard, PROMPT, guarded),
        "engine, steered, many": lambda: _many(guard, greedy, streams),
        "generate, guidance_scale": lambda: plain.submit(_generate, tokens, guidance=True).result(),
        "long context, plain": lambda: _stream(guard, fresh(), one.replace(alpha=0.0)),
        "long context, steered": lambda: _stream(guard, fresh(), one),
    }


def _generate(tokens: int, *, guidance: bool = False) -> _Run:
    import torch

    backbone = _plain
    ids = torch.tensor([backbone.tokenizer(PROMPT)["input_ids"]], device=backbone.device)
    extra: dict[str, Any] = {}
    if guidance:
        negative = torch.tensor(
            [backbone.tokenizer("A rude and toxic text: " + PROMPT)["input_ids"]], device=ids.device
        )
        extra = {"guidance_scale": 1.5, "negative_prompt_ids": negative}
    model: Any = backbone.model
    started = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=backbone.pad_token_id,
            **extra,
        )
    if backbone.device.type == "cuda":
        torch.cuda.synchronize(backbone.device)
    wall_s = time.perf_counter() - started
    return _Run(wall_s, _all_of(out.shape[1] - ids.shape[1], tokens))


def _stream(guard: DetoxiGen, prompt: str, params: DecodingParams) -> _Run:
    started = time.perf_counter()
    times = []
    count = 0
    for chunk in guard.stream(prompt, params):
        if chunk.generation is None:
            times.append(time.perf_counter())
        else:
            count = chunk.generation.usage.completion_tokens
    ended = time.perf_counter()
    first = (times[0] if times else ended) - started
    return _Run(
        ended - started, _all_of(count, params.max_new_tokens), first, [b - a for a, b in itertools.pairwise(times)]
    )


def _all_of(got: int, asked: int) -> int:
    """A run that ended early cannot be compared with one that did not."""
    if got != asked:
        raise EngineError(f"a timed run gave {got} tokens instead of {asked}")
    return got


def _many(guard: DetoxiGen, params: DecodingParams, streams: int) -> _Run:
    results: list[_Run] = []
    threads = [
        threading.Thread(target=lambda: results.append(_stream(guard, PROMPT, params)), daemon=True)
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
    return _Run(wall_s, sum(run.tokens for run in results), max(run.first_s for run in results), gaps)


def _figures(runs: list[_Run]) -> dict[str, float]:
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


def _ratios(rounds: list[dict[str, _Run]]) -> dict[str, Bar]:
    def median(over: str, under: str, figure: Callable[[_Run], float] = lambda run: run.per_token) -> float:
        return statistics.median(figure(r[over]) / figure(r[under]) for r in rounds)

    plain, steered = "engine, plain", "engine, steered"
    return {
        "steered / plain": Bar(median(steered, plain), 1.15, True),
        "guarded / steered": Bar(median("engine, guarded", steered), 1.1, True),
        "plain generate / steered": Bar(median("plain generate", steered), 1.0, False),
        "many steered streams over one": Bar(median(steered, "engine, steered, many"), 4.5, False),
        "guidance_scale / steered": Bar(median("generate, guidance_scale", steered), 1.6, False),
        "long context, first token, steered / plain": Bar(
            median("long context, steered", "long context, plain", lambda run: run.first_s), 1.2, True
        ),
    }
