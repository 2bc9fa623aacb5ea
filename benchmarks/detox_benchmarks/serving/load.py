"""Many clients of one server: mixed lengths, guarded and plain, streamed and not, some hanging up; then more of them
than it takes.

The server is a process of its own on loopback. Its scorer writes down what it passed, so that every piece of guarded
text that a client got can be looked up. Knows clocks and counts; knows no quality.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import psutil
from pydantic import Field

from detox_benchmarks.serving.client import Line
from detox_benchmarks.serving.marks import Marks
from detox_benchmarks.serving.process import started
from detox_guard import DetoxiGen, GuardPolicy
from detox_guard._strict import StrictModel
from detox_guard.guard.units import read_sentences

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from detox_benchmarks.serving.process import Started

__all__ = ["LoadConfig", "run_load"]

_PROMPTS = (
    "The quick brown fox jumps over the lazy dog, and then",
    "So, I'm starting to think she's full of",
    "My neighbour came home late again, and",
    "Here is a short story about a small town by the sea.",
)
_HANGS_UP = 0.1
_SHOWN = 8
"""Unscored pieces that are told."""
_SPARE = 8
"""Requests that a server takes besides those of its clients: one that hung up may be there for a moment yet."""
_PATIENCE_S = 300.0
"""The longest that anything may take beyond its time."""


class LoadConfig(StrictModel):
    """How a server is loaded."""

    clients: Annotated[int, Field(ge=1, le=10_000)] = 64
    """Clients at once; each asks again as soon as it is answered. In overload there are twice as many."""
    seconds: Annotated[float, Field(gt=0, le=86_400)] = 300.0
    """How long they ask."""
    warmup: Annotated[float, Field(gt=0, le=3600)] = 90.0
    """Seconds of the same before: memory grows over the first one or two thousand replies, then it stays."""
    bare: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """Seconds of the same, asked of an engine without a server."""
    overload: Annotated[float, Field(gt=0, le=3600)] = 20.0
    """Seconds of too many clients."""
    short: Annotated[int, Field(ge=1)] = 8
    """Tokens of a short reply."""
    long: Annotated[int, Field(ge=1)] = 48
    """Tokens of a long reply."""
    probes: Annotated[int, Field(ge=2)] = 300
    """Requests for what HTTP takes."""
    seed: int = 0
    """Of the mix."""
    model: str | None = None
    """Hub id, folder or file; None is the embedded default."""
    detoxifier: str = "auto"
    """Folder or hub id; "auto" is the model's own."""


@dataclass
class _Tally:
    answers: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    pieces: list[tuple[float, str]] = field(default_factory=list)
    """Guarded text, and when it came."""


def run_load(config: LoadConfig) -> dict[str, Any]:
    """The figures, JSON-able, and `bars`: what they should reach, and whether they do."""
    bare = _bare(config)
    http = _http_cost(config.probes)
    with tempfile.TemporaryDirectory() as folder:
        marks = Path(folder) / "marks.jsonl"
        marks.touch()
        server = {"max_requests": config.clients + _SPARE}
        with started(model=config.model, detoxifier=config.detoxifier, marks=str(marks), server=server) as child:
            _run(child, config, config.clients, config.warmup, _Tally())
            before, seats_before = _settled(child)
            tally = _Tally()
            served = _run(child, config, config.clients, config.seconds, tally)
            after, seats_after = _settled(child)
            crowd = _Tally()
            _run(child, config, 2 * config.clients, config.overload, crowd)
            _, seats_end = _settled(child)
        passed = Marks(marks)
    pieces = tally.pieces + crowd.pieces
    unscored = [text for when, text in pieces if not passed.passed(text, when)]
    told = {
        "clients": config.clients,
        "seconds": config.seconds,
        "answers": dict(tally.answers),
        "errors": dict(tally.errors + crowd.errors),
        "decoded_tokens_per_s": served,
        "bare_tokens_per_s": bare,
        "of_bare": served / bare,
        "first_text_s": _quantiles(tally.first),
        "guarded_pieces": len(pieces),
        "unscored_pieces": len(unscored),
        "unscored": unscored[:_SHOWN],
        "seats": {"before": seats_before, "after": seats_after, "after_overload": seats_end},
        "memory_mib": {"before": before / 2**20, "after": after / 2**20, "growth": after / before - 1},
        "overload": {"answers": dict(crowd.answers), "refusal_ms": _quantiles(crowd.refused, 1000)},
        "http_first_text_ms": http,
    }
    return {**told, "bars": _bars(told)}


def _bars(told: dict[str, Any]) -> dict[str, bool]:
    idle = {"seats": 0, "rows": 0, "queued": 0}
    return {
        "no error but refusals": not told["errors"],
        "tokens/s within 10 % of the bare engine": told["of_bare"] >= 0.9,
        "seats back": all(found == idle for found in told["seats"].values()),
        "memory grew by less than 2 %": told["memory_mib"]["growth"] < 0.02,
        "nothing unscored": told["guarded_pieces"] > 0 and told["unscored_pieces"] == 0,
        "429 in under 50 ms (p99)": told["overload"]["refusal_ms"].get("p99", 1e9) < 50,
        "HTTP adds under 3 ms (p50)": told["http_first_text_ms"]["p50"] < 3,
    }


# -- the mix


@dataclass(frozen=True)
class _Wish:
    """One request of the mix."""

    prompt: str
    tokens: int
    alpha: float | None
    guarded: bool
    stream: bool
    hangs_up: float | None
    """After so many seconds, if it is not over by then."""

    @classmethod
    def drawn(cls, config: LoadConfig, draw: random.Random) -> _Wish:
        guarded, stream, hangs_up = draw.random() < 0.5, draw.random() < 0.5, draw.random() < _HANGS_UP
        alpha = None if guarded else draw.choice((0.0, 3.0))
        prompt, tokens, patience = draw.choice(_PROMPTS), draw.choice((config.short, config.long)), draw.random()
        return cls(prompt, tokens, alpha, guarded, stream, patience if hangs_up else None)

    def body(self) -> dict[str, Any]:
        detox = {"guard": self.guarded, **({} if self.alpha is None else {"alpha": self.alpha})}
        return {"prompt": self.prompt, "max_tokens": self.tokens, "stream": self.stream, "detox": detox}


async def _loop(
    config: LoadConfig,
    clients: int,
    seconds: float,
    one: Callable[[int, _Wish], Awaitable[None]],
    decoded: Callable[[], int],
) -> float:
    """Every client asks again as soon as it was answered, for so long. Tokens decoded a second of that time; what is
    under way at its end comes to its own."""
    first, began = await asyncio.to_thread(decoded), time.monotonic()

    async def measure() -> float:
        await asyncio.sleep(seconds)
        took = time.monotonic() - began
        return (await asyncio.to_thread(decoded) - first) / took

    async def client(number: int) -> None:
        draw = random.Random(f"{config.seed} {number}")
        while time.monotonic() < began + seconds:
            await one(number, _Wish.drawn(config, draw))

    async with asyncio.timeout(seconds + _PATIENCE_S):
        measuring = asyncio.create_task(measure())
        await asyncio.gather(measuring, *map(client, range(clients)))
    return measuring.result()


def _bare(config: LoadConfig) -> float:
    """Tokens a second of an engine that the same clients ask in its own process; none of them hangs up."""
    with DetoxiGen.from_pretrained(config.model, detoxifier=config.detoxifier) as model:

        async def one(_: int, wish: _Wish) -> None:
            params = model.params.replace(max_new_tokens=wish.tokens, trace=False)
            if wish.alpha is not None:
                params = params.replace(alpha=wish.alpha)
            await model.agenerate(wish.prompt, params.replace(guard=GuardPolicy() if wish.guarded else None))

        def decoded() -> int:
            stats = model.stats()
            return stats.tokens_steered + stats.tokens_plain

        asyncio.run(_loop(config, config.clients, min(config.bare, config.warmup, 40) / 4, one, decoded))
        return asyncio.run(_loop(config, config.clients, config.bare, one, decoded))


def _run(child: Started, config: LoadConfig, clients: int, seconds: float, tally: _Tally) -> float:
    """So many clients for so long; tokens decoded a second."""

    async def load() -> float:
        lines = [Line(child.port) for _ in range(clients)]
        try:
            return await _loop(
                config,
                clients,
                seconds,
                lambda number, wish: _ask(lines[number], wish, tally),
                lambda: _engine(child)["decoded"],
            )
        finally:
            for line in lines:
                line.hang_up()

    return asyncio.run(load())


async def _ask(line: Line, wish: _Wish, tally: _Tally) -> None:
    try:
        async with asyncio.timeout(wish.hangs_up):
            await _answered(line, wish, tally)
    except TimeoutError:
        tally.answers["hung up"] += 1
        line.hang_up()
    except (OSError, EOFError) as error:
        tally.errors[type(error).__name__] += 1
        line.hang_up()


async def _answered(line: Line, wish: _Wish, tally: _Tally) -> None:
    began = time.monotonic()
    status = await line.post("/v1/completions", wish.body())
    if status != 200:
        body = await line.whole()
        if status == 429:
            tally.answers["429"] += 1
            tally.refused.append(time.monotonic() - began)
            await asyncio.sleep(1.0)  # as its Retry-After says
        else:
            tally.errors[f"{status} {json.loads(body)['error']['code']}"] += 1
        return
    if not wish.stream:
        text = json.loads(await line.whole())["choices"][0]["text"]
        if wish.guarded:
            now = time.monotonic()
            tally.pieces += [(now, sentence) for sentence, _ in read_sentences(text)]
        tally.answers["200"] += 1
        return
    first, ended = True, False
    async for piece in line.pieces():
        now = time.monotonic()
        for event in piece.decode().split("\n\n"):
            ended = ended or event == "data: [DONE]"
            if not event.startswith("data: {"):
                continue
            told = json.loads(event[6:])
            if "error" in told:
                tally.errors[f"stream {told['error']['code']}"] += 1
                continue
            text = told["choices"][0]["text"]
            if text and first:
                first = False
                tally.first.append(now - began)
            if text and wish.guarded:
                tally.pieces.append((now, text))
    if ended:
        tally.answers["200"] += 1
    else:
        tally.errors["stream cut"] += 1


# -- what the server holds, and what HTTP takes


def _engine(child: Started) -> dict[str, int]:
    """What its engine says at /metrics."""
    text = httpx.get(f"http://127.0.0.1:{child.port}/metrics", trust_env=False, timeout=60).text
    found: Counter[str] = Counter()
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        if name.startswith("detox_guard_engine_"):
            kind = name.removeprefix("detox_guard_engine_").partition("{")[0].removesuffix("_tokens_total")
            found[kind] += int(float(value))
    return dict(found)


def _settled(child: Started) -> tuple[int, dict[str, int]]:
    """Bytes of memory and what is taken, once nothing is under way any more; else as it is after a minute."""
    deadline = time.monotonic() + 60
    while True:
        held = {name: _engine(child)[name] for name in ("seats", "rows", "queued")}
        if not any(held.values()) or time.monotonic() > deadline:
            return psutil.Process(child.process.pid).memory_info().rss, held
        time.sleep(0.05)


def _http_cost(times: int) -> dict[str, float]:
    """Until the first text of a model that answers at once: what HTTP itself takes, in milliseconds."""
    taken = []

    async def probe(port: int) -> None:
        line = Line(port)
        for _ in range(times):
            began = time.perf_counter()
            assert await line.post("/v1/completions", {"prompt": "Hi", "stream": True}) == 200
            first = True
            async for _ in line.pieces():
                if first:
                    taken.append(time.perf_counter() - began)
                    first = False
        line.hang_up()

    with started(scripted=True) as child:
        asyncio.run(probe(child.port))
    return _quantiles(taken, 1000)


def _quantiles(values: list[float], unit: float = 1.0) -> dict[str, float]:
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100)
    return {"p50": round(unit * cuts[49], 3), "p99": round(unit * cuts[98], 3), "count": len(values)}
