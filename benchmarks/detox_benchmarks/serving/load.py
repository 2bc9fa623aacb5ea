"""Many clients of one server: mixed lengths, guarded and plain, streamed and not, some hanging up.

Server and clients are one process, so that a scorer can mark what it passed: every word of a guarded stream must have
been scored before. Knows HTTP, clocks and counts; knows no quality.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import psutil
from pydantic import Field

from detox_guard import DetoxiGen, EngineConfig, GuardPolicy, load_scorer
from detox_guard._strict import StrictModel
from detox_guard.server import ServerConfig
from detox_guard.server.run import Server
from detox_guard.testing import ScriptedDetoxiGen

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["LoadConfig", "run_load"]

_PROMPTS = (
    "The quick brown fox jumps over the lazy dog, and then",
    "So, I'm starting to think she's full of",
    "My neighbour came home late again, and",
    "Here is a short story about a small town by the sea.",
)
_HANGS_UP = 0.1


class LoadConfig(StrictModel):
    """How a server is loaded."""

    clients: Annotated[int, Field(ge=1, le=10_000)] = 64
    """Clients at once; each asks again as soon as it is answered."""
    seconds: Annotated[float, Field(gt=0, le=86_400)] = 300.0
    """How long."""
    short: Annotated[int, Field(ge=1)] = 8
    """Tokens of a short reply."""
    long: Annotated[int, Field(ge=1)] = 48
    """Tokens of a long reply."""
    probes: Annotated[int, Field(ge=2)] = 200
    """Requests for what HTTP and a refusal take."""
    seed: int = 0
    """Of the mix."""


class Marker:
    """A scorer that keeps what it scored."""

    def __init__(self) -> None:
        self._scorer = load_scorer(None)
        self.name = self._scorer.name
        self.seen: set[str] = set()

    def score(self, texts: Sequence[str]) -> list[float]:
        """The embedded scorer's numbers."""
        self.seen.update(text.strip() for text in texts)
        return self._scorer.score(texts)


@dataclass
class _Tally:
    statuses: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    unscored: int = 0
    pieces: int = 0


def run_load(config: LoadConfig, model: DetoxiGen | None = None) -> dict[str, Any]:
    """The figures, JSON-able: answers by status, tokens a second here and of the bare engine, memory, what is left."""
    marker = Marker()
    guard = GuardPolicy(scorer=marker)
    loaded = model or DetoxiGen.from_pretrained(config=EngineConfig(when_full="refuse"))
    bare = _bare(loaded, config)
    serving = ServerConfig(port=0, guard=guard, max_requests=4 * config.clients)
    with _served(loaded, serving) as server:
        asyncio.run(_load(server.url, LoadConfig(clients=config.clients, seconds=1, short=2, long=4), marker, _Tally()))
        before = psutil.Process().memory_info().rss
        tally = _Tally()
        began = time.monotonic()
        asyncio.run(_load(server.url, config, marker, tally))
        took = time.monotonic() - began
        left = _left(loaded)
        after = psutil.Process().memory_info().rss
    return {
        "answers": dict(tally.statuses),
        "tokens_per_s": tally.tokens / took,
        "bare_tokens_per_s": bare,
        "first_text_s": _quantiles(tally.first),
        "guarded_pieces": tally.pieces,
        "unscored_pieces": tally.unscored,
        "left": left,
        "memory_growth": after / before - 1,
        "http_first_text_ms": _http_cost(config.probes),
        "refusal_ms": _refusals(config.probes),
    }


async def _load(url: str, config: LoadConfig, marker: Marker, tally: _Tally) -> None:
    until = time.monotonic() + config.seconds
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False) as client:

        async def one(number: int) -> None:
            draw = random.Random(f"{config.seed} {number}")
            while time.monotonic() < until:
                await _ask(client, config, draw, marker, tally)

        await asyncio.gather(*(one(number) for number in range(config.clients)))


async def _ask(
    client: httpx.AsyncClient, config: LoadConfig, draw: random.Random, marker: Marker, tally: _Tally
) -> None:
    guarded, stream, hangs_up = draw.random() < 0.5, draw.random() < 0.5, draw.random() < _HANGS_UP
    body = {
        "prompt": draw.choice(_PROMPTS),
        "max_tokens": draw.choice((config.short, config.long)),
        "stream": stream,
        **({"stream_options": {"include_usage": True}} if stream else {}),
        "detox": {"guard": guarded, **({} if guarded else {"alpha": draw.choice((0, 3))})},
    }
    began = time.perf_counter()
    try:
        if not stream:
            request = client.post("/v1/completions", json=body)
            answer = await (asyncio.wait_for(request, draw.random()) if hangs_up else request)
            tally.statuses[str(answer.status_code)] += 1
            tally.tokens += answer.json().get("usage", {}).get("completion_tokens", 0)
            return
        async with client.stream("POST", "/v1/completions", json=body) as response:
            first = True
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    tally.statuses[str(event["error"]["code"])] += 1
                    return
                if not event["choices"]:
                    tally.tokens += event["usage"]["completion_tokens"]
                    continue
                choice = event["choices"][0]
                if choice["text"] and first:
                    first = False
                    tally.first.append(time.perf_counter() - began)
                    if hangs_up:
                        tally.statuses["hung up"] += 1
                        return
                if guarded and choice["text"].strip():
                    tally.pieces += 1
                    tally.unscored += not _was_scored(choice["text"].strip(), marker)
            tally.statuses[str(response.status_code)] += 1
    except TimeoutError:
        tally.statuses["hung up"] += 1


def _was_scored(piece: str, marker: Marker) -> bool:
    if piece == GuardPolicy().replacement or piece in marker.seen:
        return True
    return any(piece in text for text in list(marker.seen))


def _bare(model: DetoxiGen, config: LoadConfig) -> float:
    """Tokens a second of a full batch that nobody serves."""
    prompts = [_PROMPTS[i % len(_PROMPTS)] for i in range(config.clients)]
    began = time.perf_counter()
    replies = model.batch(prompts, model.params.replace(max_new_tokens=config.long, ignore_eos=True))
    return float(sum(reply.usage.completion_tokens for reply in replies) / (time.perf_counter() - began))


def _left(model: DetoxiGen) -> dict[str, int]:
    deadline = time.monotonic() + 60
    while (stats := model.stats()).seats and time.monotonic() < deadline:
        time.sleep(0.05)
    return {"seats": stats.seats, "rows": stats.rows, "queued": stats.queued}


def _http_cost(times: int) -> dict[str, float]:
    """Until the first text of a model that answers at once: what HTTP itself takes, in milliseconds."""
    taken = []
    with (
        _served(ScriptedDetoxiGen(), ServerConfig(port=0, guard=None)) as server,
        httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client,
    ):
        for _ in range(times):
            began = time.perf_counter()
            with client.stream("POST", "/v1/completions", json={"prompt": "Hi", "stream": True}) as response:
                next(response.iter_raw())
                taken.append(1000 * (time.perf_counter() - began))
    return _quantiles(taken)


def _refusals(times: int) -> dict[str, float]:
    """How long it takes a full server to refuse, in milliseconds."""
    model = ScriptedDetoxiGen()
    taken = []
    with (
        _served(model, ServerConfig(port=0, guard=None, max_requests=1)) as server,
        httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client,
    ):
        waiting = threading.Thread(
            target=lambda: httpx.post(f"{server.url}/v1/completions", json={"prompt": "Hi"}, timeout=None)
        )
        with model.hold():
            waiting.start()
            model.wait_for(1)
            for _ in range(times):
                began = time.perf_counter()
                answer = client.post("/v1/completions", json={"prompt": "Hi"})
                assert answer.status_code == 429, answer.text
                taken.append(1000 * (time.perf_counter() - began))
        waiting.join()
    return _quantiles(taken)


def _quantiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100)
    return {"p50": cuts[49], "p99": cuts[98]}


@contextmanager
def _served(model: Any, config: ServerConfig) -> Iterator[Server]:
    server = Server({"model": model}, config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join()
