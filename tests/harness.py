"""Drives the engine from tests: a sink that records, one call to decode some prompts, and one to hold them against the
oracle."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from reference import Reference

from detox_guard.detoxifiers.base import EmbeddingPrefix, Place, TokenPrefix, View
from detox_guard.detoxifiers.card import DetoxifierCard
from detox_guard.detoxifiers.soft_prompt import Detoxifier
from detox_guard.engine import (
    End,
    Engine,
    Go,
    PromptIds,
    Request,
    Sampling,
    Scheduler,
    TokenConstraint,
    TokenStep,
)
from detox_guard.engine.torch.runner import torch_runner
from detox_guard.settings import EngineConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from detox_guard.models.backbone import Backbone
    from detox_guard.settings import DecodingParams


class Recorder:
    """A sink that keeps everything. `react(step)` may return a verdict for the engine; None goes on."""

    def __init__(self, react: Callable[[TokenStep], Any] | None = None) -> None:
        self.steps: list[TokenStep] = []
        self.outcome: str | Exception | None = None
        self.react = react
        self._done = threading.Event()

    def on_token(self, step: TokenStep) -> Any:
        self.steps.append(step)
        verdict = self.react(step) if self.react else None
        return Go() if verdict is None else verdict

    def on_end(self, reason: str) -> Any:
        return End(reason)

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


def torch_engine(backbone: Backbone, streams: Sequence[View] = (), config: EngineConfig | None = None) -> Engine:
    config = config or EngineConfig()
    return Scheduler(torch_runner(backbone, streams, config), config)


def request(
    prompt: Sequence[int],
    params: DecodingParams,
    sink: Recorder | None = None,
    *,
    seed: int = 1,
    end_ids: frozenset[int] = frozenset(),
    keep: bool = False,
    constraint: TokenConstraint | None = None,
    may_rewind: bool = True,
    views: Sequence[View] = (),
) -> tuple[Request, Recorder]:
    sink, steered = sink or Recorder(), params.alpha > 0
    own = tuple(map(tuple, contexts_of(prompt, views))) if steered else ()
    made = Request(
        PromptIds(tuple(prompt), steered, own),
        Sampling.of(params),
        params.max_new_tokens,
        seed,
        end_ids,
        sink,
        constraint=constraint,
        may_rewind=may_rewind,
        keep_distributions=keep,
    )
    return made, sink


def contexts_of(prompt: Sequence[int], views: Sequence[View]) -> list[list[int]]:
    """What the views of place "system" read for this prompt: longer and shorter than it is, and never the same."""
    own = [view for view in views if view.place == "system"]
    return [[9 + i, *prompt[: 12 * i + 3], 7, *prompt[-8:], 5] for i, _ in enumerate(own)]


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


def random_streams(backbone: Backbone, kinds: str, *, width: int = 5, scale: float = 1.0) -> list[View]:
    """One view a letter: soft prompts of place `f`ront and `r`eply; texts `t` (front), `b` (between context and reply),
    `e` (the same, with the context's end again) and `s` (system). A capital is an expert (weight +1)."""
    g = torch.Generator().manual_seed(7)
    views: list[View] = []
    for i, kind in enumerate(kinds):
        weight, at = 1.0 if kind.isupper() else -1.0, kind.lower()
        if at in "fr":
            soft = torch.randn(width + i, backbone.hidden_size, generator=g) * scale
            views.append(EmbeddingPrefix(soft, weight, "front" if at == "f" else "reply"))
        else:
            ids = tuple(torch.randint(4, backbone.vocab_size, (width + i,), generator=g).tolist())
            place: Place = "front" if at == "t" else "system" if at == "s" else "reply"
            views.append(TokenPrefix(ids, weight, place, tail=6 if at == "e" else 0))
    return views


def random_prompts(backbone: Backbone, count: int, **lengths: int) -> list[list[int]]:
    return random_ids(backbone.vocab_size, count, **lengths)


def random_ids(vocab_size: int, count: int, *, shortest: int = 1, longest: int = 24, seed: int = 0) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=g).tolist()
    return [torch.randint(4, vocab_size, (n,), generator=g).tolist() for n in lengths]


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


def alone_fails(
    engine: Engine, params: DecodingParams, sink: Recorder, *, beside: DecodingParams | None = None, **changes: Any
) -> Any:
    """What a request that must fail comes to, beside one that is not touched. Closes the engine."""
    bad, bad_sink = request([5, 6], params, sink, **changes)
    good, good_sink = request([5, 6], beside or params)
    engine.submit(bad)
    engine.submit(good)
    outcome = bad_sink.wait().outcome
    assert good_sink.wait().outcome == "length"
    engine.close()
    return outcome


def check_against_oracle(
    backbone: Backbone,
    streams: list[View],
    prompts: list[list[int]],
    params: DecodingParams,
    *,
    on: Backbone | None = None,
    tolerance: float = 1e-5,
    **config: int,
) -> None:
    """`check_engine` on torch. `on`: the copy of the backbone that the engine runs on."""
    oracle = Reference.of(backbone.model, streams)
    engine = torch_engine(on or backbone, streams, EngineConfig(max_rows=16, **config))
    check_engine(engine, oracle, prompts, params, tolerance)


def check_engine(
    engine: Engine, oracle: Reference, prompts: list[list[int]], params: DecodingParams, tolerance: float = 1e-5
) -> None:
    """Greedy tokens equal, and every distribution within `tolerance`, except where the nucleus' edge is a coin toss."""
    steps = unsure_steps = 0
    for prompt, sink in zip(prompts, decode(engine, prompts, params, keep=True, views=oracle.streams), strict=True):
        p_ref, unsure = oracle.distributions(prompt, sink.ids, params, contexts_of(prompt, oracle.streams))
        for step, ref, close in zip(sink.steps, p_ref, unsure, strict=True):
            steps += 1
            unsure_steps += close
            if close:
                continue
            assert step.distribution is not None
            ids, p = step.distribution
            dense = torch.zeros_like(ref).scatter_(0, ids, p.double())
            assert (dense - ref).abs().max() <= tolerance
            assert ref[step.token_id] > 0
            if params.temperature == 0:
                assert step.token_id == ref.argmax()
    stats = engine.stats()
    assert stats.tokens_steered == stats.steps_steered == steps
    assert unsure_steps <= 2 + steps * 0.01
    engine.close()
