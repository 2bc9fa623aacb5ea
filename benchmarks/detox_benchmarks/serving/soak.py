"""One model under a mixed load for minutes: does it grow, does it fail, are its seats free afterwards?

Short and long prompts and replies, plain, steered and guarded, in chats with tools, bound to a grammar, and dropped in
the middle. Beside them one request is asked again and again: its text must never change. Knows the model object, clocks
and counts; knows no quality.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import psutil
from pydantic import Field

from detox_guard import ChatPrompt, DecodingParams, DetoxiGen, Grammar, GuardPolicy, LoadOptions
from detox_guard.evaluation.machine import machine, peak_memory_mib, versions

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["SoakConfig", "run_soak"]

_WORDS = (
    *("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then"),
    *("it", "runs", "home", "to", "its", "small", "house", "by", "the", "sea"),
)
_WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
_JSON = Grammar.json_schema({"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]})
_POINTS = 40
"""How often memory is told."""


class SoakConfig(LoadOptions):
    """What `run_soak` loads, and how long it is asked. Raises `InvalidParamsError`."""

    model: str | None = None
    """Hub id, folder or .gguf file; else the embedded default model."""
    detoxifier: Any = "auto"
    """Folder or hub id; else "auto"."""
    minutes: Annotated[float, Field(gt=0, le=1440)] = 30.0
    """How long."""
    clients: Annotated[int, Field(ge=1, le=1000)] = 6
    """Who ask at once; each asks again as soon as it is answered."""
    longest: Annotated[int, Field(ge=1)] = 600
    """Words of the longest prompt."""
    tokens: Annotated[int, Field(ge=1)] = 64
    """Of the longest reply."""
    seed: int = 0
    """Of the mix."""


class _Load:
    """The clients, and what became of what they asked."""

    def __init__(self, model: DetoxiGen, config: SoakConfig, until_s: float) -> None:
        self._model, self._config, self._until_s = model, config, until_s
        self._lock = threading.Lock()
        self.asked: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.tokens = 0
        self.probes: set[str] = set()
        """Texts of the one request that is asked again and again."""

    def run(self, number: int) -> None:
        draw = random.Random(f"{self._config.seed} {number}")
        kinds: dict[str, Callable[[random.Random], int]] = {
            "reply": self._reply, "dropped": self._dropped, "chat with tools": self._tools, "grammar": self._grammar,
            "several": self._several, "probe": self._probe,
        }  # fmt: skip
        while time.monotonic() < self._until_s:
            (kind,) = draw.choices(list(kinds), weights=(8, 3, 2, 2, 1, 1))
            try:
                tokens = kinds[kind](draw)
            except Exception as error:  # all of them are told
                with self._lock:
                    self.errors[f"{kind}: {type(error).__name__}: {error}"[:200]] += 1
                time.sleep(0.05)  # one who fails at once does not fill the table
                continue
            with self._lock:
                self.asked[kind] += 1
                self.tokens += tokens

    def _prompt(self, draw: random.Random) -> str:
        """Short or long; half of the long ones begin alike."""
        words = draw.randint(3, 12) if draw.random() < 0.7 else draw.randint(20, self._config.longest)
        lead = ["Once"] if draw.random() < 0.5 else [*_WORDS] * 8
        return " ".join([*lead, *draw.choices(_WORDS, k=words)][: self._config.longest])

    def _params(self, draw: random.Random) -> DecodingParams:
        most = self._config.tokens
        params = DecodingParams(
            max_new_tokens=draw.choice((max(1, most // 8), most)),
            temperature=draw.choice((0.0, 0.8, 1.0)),
            seed=draw.randrange(1 << 30),
        )
        way = draw.choice(("plain", "steered", "guarded")) if self._model.streams else "plain"
        # A threshold under which some sentences are taken back.
        guard = GuardPolicy(threshold=draw.choice((0.5, 0.05))) if way == "guarded" else None
        return params.replace(alpha=0.0 if way == "plain" else 3.0, guard=guard)

    def _reply(self, draw: random.Random) -> int:
        return self._model.generate(self._prompt(draw), self._params(draw)).usage.completion_tokens

    def _dropped(self, draw: random.Random) -> int:
        """Left after a few chunks, or before the first."""
        with closing(self._model.stream(self._prompt(draw), self._params(draw))) as chunks:
            left = draw.randint(0, 6)
            for _ in zip(range(left), chunks, strict=False):
                pass
            return left

    def _tools(self, draw: random.Random) -> int:
        if not self._model.backbone.has_chat_template:
            return self._reply(draw)
        messages = [{"role": "user", "content": self._prompt(draw)}]
        return self._model.generate(ChatPrompt(messages, [_WEATHER]), self._params(draw)).usage.completion_tokens

    def _grammar(self, draw: random.Random) -> int:
        params = self._params(draw).replace(grammar=_JSON, max_new_tokens=16)
        return self._model.generate(self._prompt(draw), params).usage.completion_tokens

    def _several(self, draw: random.Random) -> int:
        replies = self._model.batch([self._prompt(draw) for _ in range(4)], self._params(draw))
        return sum(reply.usage.completion_tokens for reply in replies)

    def _probe(self, _: random.Random) -> int:
        alpha = 3.0 if self._model.streams else 0.0
        reply = self._model.generate("The people next door", alpha=alpha, seed=5, max_new_tokens=12)
        with self._lock:
            self.probes.add(reply.text)
        return reply.usage.completion_tokens


def run_soak(config: SoakConfig) -> dict[str, Any]:
    """The figures, JSON-able. `rss_mib` is read at even times; `growth` is its last third over the third before.

    Raises what loading raises. What requests raise is counted under `errors`.
    """
    process = psutil.Process()
    with DetoxiGen.from_pretrained(config.model, detoxifier=config.detoxifier, **config.loading) as model:
        begun_s = time.monotonic()
        load = _Load(model, config, begun_s + 60 * config.minutes)
        clients = [threading.Thread(target=load.run, args=(number,), daemon=True) for number in range(config.clients)]
        for client in clients:
            client.start()
        rss, most_seats = [], 0
        while any(client.is_alive() for client in clients):
            time.sleep(60 * config.minutes / _POINTS)
            rss.append(round(process.memory_info().rss / 2**20))
            most_seats = max(most_seats, model.stats().seats)
        for client in clients:
            client.join()
        took_s = time.monotonic() - begun_s
        deadline_s = time.monotonic() + 60
        while (left := model.stats()).seats and time.monotonic() < deadline_s:
            time.sleep(0.05)
        third = max(1, len(rss) // 3)
        before, after = rss[-2 * third : -third] or rss, rss[-third:]
        return {
            **model.backbone.identity,
            "minutes": round(took_s / 60, 2),
            "asked": dict(load.asked),
            "errors": dict(load.errors),
            "texts_of_the_probe": len(load.probes),
            "tokens_per_s": round(load.tokens / took_s, 1),
            "rss_mib": rss,
            "growth": round(sum(after) / len(after) / (sum(before) / len(before)) - 1, 4),
            "peak_mib": peak_memory_mib(model.backbone.device),
            "most_seats": most_seats,
            "left": {"seats": left.seats, "rows": left.rows, "queued": left.queued, "waiting": left.waiting},
            "counted": {
                name: getattr(left, name)
                for name in ("submitted", "finished", "cancelled", "failed", "tokens_rewound", "fallbacks")
            },
            "steered_tokens_all_contrasted": left.tokens_steered == left.steps_steered,
            "machine": machine(model.backbone.device),
            "versions": versions(),
        }
