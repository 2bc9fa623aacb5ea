"""Drives the engine from tests: a sink that records, one call to decode some prompts, and one to hold them against the
oracle."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from reference import Reference

from detox_guard.detoxifiers.soft_prompt import Detoxifier, DetoxifierCard
from detox_guard.engine import Ended, Engine, Request, StreamSpec, TokenStep
from detox_guard.engine.torch.runner import TorchRunner
from detox_guard.settings import EngineConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from detox_guard.models.backbone import Backbone
    from detox_guard.settings import DecodingParams


class Recorder:
    """A sink that keeps everything. `react(step)` may return a verdict for the engine."""

    def __init__(self, react: Callable[[TokenStep], Any] | None = None) -> None:
        self.steps: list[TokenStep] = []
        self.outcome: str | Exception | None = None
        self.react = react
        self._done = threading.Event()

    def on_token(self, step: TokenStep) -> Any:
        self.steps.append(step)
        return self.react(step) if self.react else None

    def on_end(self, reason: str) -> Any:
        return Ended(reason)

    def on_finish(self, reason: str) -> None:
        self.outcome = reason
        self._done.set()

    def on_error(self, error: Exception) -> None:
        self.outcome = error
        self._done.set()

    def wait(self, timeout_s: float = 120) -> Recorder:
        assert self._done.wait(timeout_s), "the engine never answered"
        return self

    @property
    def ids(self) -> list[int]:
        return [step.token_id for step in self.steps]


def torch_engine(backbone: Backbone, streams: Sequence[StreamSpec] = (), config: EngineConfig | None = None) -> Engine:
    config = config or EngineConfig()
    return Engine(TorchRunner(backbone, streams, config), config)


def request(
    prompt: Sequence[int],
    params: DecodingParams,
    sink: Recorder | None = None,
    *,
    seed: int = 1,
    end_ids: frozenset[int] = frozenset(),
    keep: bool = False,
) -> tuple[Request, Recorder]:
    sink = sink or Recorder()
    return Request(list(prompt), params, seed, end_ids, sink, keep_distributions=keep), sink


def decode(engine: Engine, prompts: Sequence[Sequence[int]], params: DecodingParams, **kw: Any) -> list[Recorder]:
    """Submit all prompts at once; every reply, in order."""
    pairs = [request(prompt, params, **kw) for prompt in prompts]
    for req, _ in pairs:
        engine.submit(req)
    for _, sink in pairs:
        sink.wait()
        if isinstance(sink.outcome, Exception):
            raise sink.outcome
    return [sink for _, sink in pairs]


def random_streams(backbone: Backbone, kinds: str, *, width: int = 5, scale: float = 1.0) -> list[StreamSpec]:
    """One stream a letter: `f` front detoxifier, `r` reply detoxifier, `F`/`R` the same as experts (weight +1)."""
    g = torch.Generator().manual_seed(7)
    return [
        StreamSpec(
            torch.randn(width + i, backbone.hidden_size, generator=g) * scale, 1.0 if k.isupper() else -1.0, k in "fF"
        )
        for i, k in enumerate(kinds)
    ]


def random_prompts(
    backbone: Backbone, count: int, *, shortest: int = 1, longest: int = 24, seed: int = 0
) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=g).tolist()
    return [torch.randint(4, backbone.vocab_size, (n,), generator=g).tolist() for n in lengths]


def random_detoxifier(backbone: Backbone, position: str = "reply", *, width: int = 5, seed: int = 7) -> Detoxifier:
    """A soft prompt of noise for this backbone: it steers, though not away from anything."""
    card = DetoxifierCard(
        base_id=backbone.id,
        hidden_size=backbone.hidden_size,
        num_layers=backbone.num_layers,
        virtual_tokens=width,
        position=position,
    )
    g = torch.Generator().manual_seed(seed)
    return Detoxifier(torch.randn(width, backbone.hidden_size, generator=g), card)


def check_against_oracle(
    backbone: Backbone,
    streams: list[StreamSpec],
    prompts: list[list[int]],
    params: DecodingParams,
    *,
    on: Backbone | None = None,
    **config: int,
) -> None:
    """Greedy tokens equal, and every distribution within 1e-5, except where the nucleus' edge is a coin toss. `on`: the
    copy of the backbone that the engine runs on."""
    oracle = Reference.of(backbone.model, streams)
    engine = torch_engine(on or backbone, streams, EngineConfig(max_rows=16, **config))
    steps = unsure_steps = 0
    for prompt, sink in zip(prompts, decode(engine, prompts, params, keep=True), strict=True):
        p_ref, unsure = oracle.distributions(prompt, sink.ids, params)
        for step, ref, close in zip(sink.steps, p_ref, unsure, strict=True):
            steps += 1
            unsure_steps += close
            if close:
                continue
            assert step.distribution is not None
            ids, p = step.distribution
            dense = torch.zeros_like(ref).scatter_(0, ids, p.double())
            assert (dense - ref).abs().max() <= 1e-5
            assert ref[step.token_id] > 0
            if params.temperature == 0:
                assert step.token_id == ref.argmax()
    stats = engine.stats()
    assert stats.tokens_guarded == stats.steps_guarded == steps
    assert unsure_steps <= 2 + steps * 0.01
    engine.close()
