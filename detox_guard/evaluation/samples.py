"""Continuations of the prompts under one system, and what each of them cost. Knows the guard; judges nothing."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from detox_guard.evaluation.likelihood import reply_nll
from detox_guard.text import encode_prompt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from detox_guard.evaluation.prompts import EvalPrompt
    from detox_guard.generation import DetoxiGen
    from detox_guard.params import DecodingParams
    from detox_guard.reply import Generation

    Tick = Callable[[int], None]

__all__ = ["Run", "Sample", "System", "decode", "seed_of"]

_POLL_S = 0.5


@dataclass(frozen=True)
class System:
    """One way of decoding under test. `params.alpha` 0 is the plain model."""

    name: str
    params: DecodingParams


@dataclass(frozen=True, slots=True)
class Sample:
    """One continuation. Divergences are summed over its tokens, in nats; `nll` is under the plain backbone."""

    text: str
    finish_reason: str
    seed: int
    tokens: int
    nll: float
    fallbacks: int
    kl_detoxifier: float
    kl_steering: float


@dataclass(frozen=True)
class Run:
    """All samples of one system, `samples[prompt][i]`; `wall_s` is the decoding alone."""

    system: System
    samples: list[list[Sample]]
    wall_s: float

    @property
    def tokens_per_s(self) -> float:
        return sum(one.tokens for many in self.samples for one in many) / self.wall_s


def seed_of(seed: int, prompt: int, sample: int, samples: int) -> int:
    """The seed of one sample: the same for every system, so that systems differ by what they do and not by luck."""
    return (seed * 1_000_003 + prompt * samples + sample) % 2**63


def decode(guard: DetoxiGen, prompts: Sequence[EvalPrompt], system: System, samples: int, seed: int, tick: Tick) -> Run:
    """`samples` continuations of every prompt, all in one batch. `tick` hears how many are done.

    Raises what `DetoxiGen.batch` raises.
    """
    asked = [(i, j) for i in range(len(prompts)) for j in range(samples)]
    params = [system.params.replace(seed=seed_of(seed, i, j, samples), trace=True) for i, j in asked]
    with _watched(guard, tick):
        begin = time.perf_counter()
        replies = guard.batch([prompts[i].text for i, _ in asked], params)
        wall_s = time.perf_counter() - begin
    return Run(
        system,
        [
            _samples(guard, prompt.text, replies[i * samples : (i + 1) * samples])
            for i, prompt in enumerate(prompts)
        ],
        wall_s,
    )  # fmt: skip


def _samples(guard: DetoxiGen, prompt: str, replies: Sequence[Generation]) -> list[Sample]:
    traces = [reply.trace.tokens if reply.trace else () for reply in replies]
    ids = [[token.token_id for token in tokens] for tokens in traces]
    nats = reply_nll(guard.backbone, encode_prompt(guard.backbone, prompt), ids)
    return [
        Sample(
            text=reply.text,
            finish_reason=reply.finish_reason,
            seed=reply.seed,
            tokens=len(tokens),
            nll=nll,
            fallbacks=sum(token.fallback for token in tokens),
            kl_detoxifier=sum(token.kl_detoxifier for token in tokens),
            kl_steering=sum(token.kl_steering for token in tokens),
        )
        for reply, tokens, nll in zip(replies, traces, nats, strict=True)
    ]


@contextmanager
def _watched(guard: DetoxiGen, tick: Tick) -> Iterator[None]:
    """Report the engine's count of finished requests while the caller waits for a batch."""
    over, before = threading.Event(), guard.stats().finished

    def watch() -> None:
        while not over.wait(_POLL_S):
            tick(guard.stats().finished - before)

    watcher = threading.Thread(target=watch, name="detox-guard-progress", daemon=True)
    watcher.start()
    try:
        yield
        tick(guard.stats().finished - before)
    finally:
        over.set()
        watcher.join()
