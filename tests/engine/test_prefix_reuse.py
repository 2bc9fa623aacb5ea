"""A prompt that begins like one computed lately goes on from it. What comes out is what would have come out anyway."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from harness import Recorder, check_engine, decode, random_ids, random_streams, request
from kits import engine_of, prompts_for, watched_engine
from reference import Reference
from tiny import make_tiny_backbone
from watched import Watched

from detox_guard.engine import Scheduler
from detox_guard.engine.torch.runner import TorchRunner
from detox_guard.errors import RequestCancelledError
from detox_guard.settings import DecodingParams, EngineConfig

if TYPE_CHECKING:
    from kits import Kit

GREEDY = DecodingParams(temperature=0.0, alpha=1.5, max_new_tokens=6)
SAMPLED = GREEDY.replace(temperature=1.0)
SYSTEM = 80
"""Tokens that the prompts here have in common."""


@pytest.fixture
def kit(kit: Kit) -> Kit:
    """Of the runners that say they can."""
    runner = kit.runner("", EngineConfig())
    continues = runner.limits.continues
    runner.close()
    if not continues:
        pytest.skip("this runner goes on from nothing")
    return kit


def family(kit: Kit, count: int, *, common: int = SYSTEM, own: int = 12) -> list[list[int]]:
    """Prompts that begin alike."""
    system = prompts_for(kit, 1, shortest=common, longest=common, seed=9)[0]
    return [system + prompt for prompt in prompts_for(kit, count, shortest=3, longest=own, seed=4)]


@pytest.mark.parametrize("views", ["", "r", "fr", "fRr"])
def test_what_is_shared_is_not_computed_again(kit: Kit, views: str) -> None:
    prompts = family(kit, 4)
    params = SAMPLED if views else SAMPLED.replace(alpha=0.0)
    fresh, whole = watched_engine(kit, views, prompt_cache_slots=0)
    expected = [decode(fresh, [prompt], params)[0].ids for prompt in prompts]
    fresh.close()
    engine, runner = watched_engine(kit, views)
    assert [decode(engine, [prompt], params)[0].ids for prompt in prompts] == expected
    first, *others = runner.columns
    assert first == whole.columns[0] >= len(prompts[0])
    assert others == [columns - kit.spared(SYSTEM, views) for columns in whole.columns[1:]]
    engine.close()


@pytest.mark.parametrize("kinds", ["r", "fr", "fbSeT"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
def test_what_goes_on_equals_the_oracle(kind: str, kinds: str) -> None:
    """Views of every place, one prompt behind the other: all but the first go on from another, or from part of it."""
    backbone = make_tiny_backbone(kind, initializer_range=0.2)
    views = random_streams(backbone, kinds)
    oracle = Reference.of(make_tiny_backbone(kind, initializer_range=0.2).model, views)
    config = EngineConfig(prefill_chunk=100, max_rows=64)
    runner = Watched(TorchRunner(backbone, views, config))
    beginning = random_ids(backbone.vocab_size, 1, shortest=SYSTEM, longest=SYSTEM)[0]
    prompts = [beginning[: 70 + 5 * (i % 3)] + own for i, own in enumerate(random_ids(backbone.vocab_size, 5, seed=3))]
    check_engine(Scheduler(runner, config), oracle, prompts, GREEDY.replace(rule="bounded"))
    assert max(runner.columns[1:]) < 70


def test_a_chat_goes_on_from_its_last_turn_and_goes_back_to_an_earlier_one(kit: Kit) -> None:
    engine, runner = watched_engine(kit, "r")
    first = family(kit, 1)[0]
    reply = decode(engine, [first], GREEDY)[0].ids
    second = [*first, *reply, 17, 18, 19]
    third = [*second, 20, 21]
    fresh, whole = watched_engine(kit, "r", prompt_cache_slots=0)
    for prompt in (second, third, second[:-1], first[:-1]):
        assert decode(engine, [prompt], GREEDY)[0].ids == decode(fresh, [prompt], GREEDY)[0].ids
    # One that is whole in another still computes its last token.
    shared = [len(first), len(second), len(second) - 2, len(first) - 2]
    spared = [kit.spared(common, "r") for common in shared]
    assert runner.columns[1:] == [columns - less for columns, less in zip(whole.columns, spared, strict=True)]
    engine.close()
    fresh.close()


@pytest.mark.parametrize("common", [63, 64])
def test_a_short_beginning_in_common_is_computed_again(kit: Kit, common: int) -> None:
    fresh, whole = watched_engine(kit, "r", prompt_cache_slots=0)
    engine, runner = watched_engine(kit, "r")
    one, other = family(kit, 2, common=common)
    one, other = [*one[:common], 5, *one[common:]], [*other[:common], 6, *other[common:]]
    decode(engine, [one], GREEDY)
    for each in (fresh, engine):
        decode(each, [other], GREEDY)
        each.close()
    assert runner.columns[1] == whole.columns[0] - (0 if common == 63 else kit.spared(64, "r"))


def test_neighbours_of_several_lengths_go_on_together(kit: Kit) -> None:
    """Computed side by side: some from a base, one from none, each as if alone."""
    prompts = [*family(kit, 3), *prompts_for(kit, 2, shortest=20, longest=70, seed=11)]
    fresh = engine_of(kit, "fr", prompt_cache_slots=0)
    expected = [decode(fresh, [prompt], SAMPLED)[0].ids for prompt in prompts]
    engine, runner = watched_engine(kit, "fr", prefill_chunk=512)
    decode(engine, [prompts[0]], GREEDY)
    busy, sink = request([5, 6], GREEDY, Recorder(lambda step: submit_all() if step.index == 0 else None))
    pairs = [request(prompt, SAMPLED) for prompt in prompts[1:]]

    def submit_all() -> None:
        for one, _ in pairs:
            engine.submit(one)

    engine.submit(busy)
    sink.wait()
    assert [found.wait().ids for _, found in pairs] == expected[1:]
    assert max(map(len, runner.begun)) > 1
    engine.close()
    fresh.close()


def test_one_that_is_cancelled_while_it_goes_on_leaves_the_other_whole(kit: Kit) -> None:
    one, other, third = family(kit, 3)
    fresh = engine_of(kit, "r", prompt_cache_slots=0)
    expected = decode(fresh, [third], SAMPLED)[0].ids
    engine, runner = watched_engine(kit, "r")
    decode(engine, [one], GREEDY)
    dropped, sink = request(other, SAMPLED)
    runner.before_advance = lambda prompts, _: dropped.cancel() if prompts[0].ids == tuple(other) else None
    engine.submit(dropped)
    assert isinstance(sink.wait().outcome, RequestCancelledError)
    assert decode(engine, [third], SAMPLED)[0].ids == expected
    assert engine.stats().seats == 0
    engine.close()
    fresh.close()


def test_what_is_kept_stays_within_its_bound(kit: Kit) -> None:
    engine, runner = watched_engine(kit, "r", prompt_cache_slots=500)
    for prompt in family(kit, 8, own=40):
        decode(engine, [prompt], GREEDY)
        assert runner.held_slots <= 500
    assert runner.columns[-1] < SYSTEM
    engine.close()


def test_a_runner_that_cannot_is_not_asked_to(kit: Kit) -> None:
    engine, runner = watched_engine(kit, "r")
    runner.limits = runner.limits.__class__(
        runner.limits.vocab_size, runner.limits.max_positions, runner.limits.views, continues=False
    )
    fresh, whole = watched_engine(kit, "r", prompt_cache_slots=0)
    for prompt in family(kit, 2):
        decode(engine, [prompt], GREEDY)
        decode(fresh, [prompt], GREEDY)
    assert runner.columns == whole.columns
    engine.close()
    fresh.close()
