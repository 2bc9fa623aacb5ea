"""What a reply is, whoever is beside it and whatever was taken back: the engine's promises, on every runner."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from harness import Recorder, alone_fails, check_engine, decode, request
from kits import engine_of, prompts_for, watched_engine

from detox_guard.engine import End, Go, Rewind, Sampling, TokenStep
from detox_guard.errors import EngineError
from detox_guard.settings import DecodingParams

if TYPE_CHECKING:
    from collections.abc import Callable

    from kits import Kit

GREEDY = DecodingParams(temperature=0.0, alpha=1.5, max_new_tokens=12)
SAMPLED = DecodingParams(temperature=1.0, alpha=1.5, max_new_tokens=12)


@pytest.mark.parametrize(
    ("views", "params"),
    [
        ("f", GREEDY.replace(rule="detoxigen")),
        ("r", GREEDY),
        ("frR", SAMPLED.replace(rule="dexperts", top_p=0.8)),
        ("fF", SAMPLED.replace(top_k=7, repetition_penalty=1.3, temperature=1.4)),
    ],
)
def test_distributions_equal_the_oracle(kit: Kit, views: str, params: DecodingParams) -> None:
    engine = engine_of(kit, views, prefill_chunk=16, max_rows=16)
    check_engine(engine, kit.reference(views), prompts_for(kit, 10, longest=40), params)


def test_alpha_zero_equals_the_backends_own_decoding_and_takes_one_row(kit: Kit) -> None:
    engine = engine_of(kit, "fr")
    prompts = prompts_for(kit, 6, shortest=2)
    rows: list[int] = []
    for prompt in prompts:
        sink = Recorder(lambda step: rows.append(engine.stats().rows))
        engine.submit(request(prompt, GREEDY.replace(alpha=0.0), sink)[0])
        assert sink.wait().ids == kit.plain(prompt, 12)
    assert set(rows) == {1}
    steered = Recorder(lambda step: rows.append(engine.stats().rows))
    engine.submit(request([5, 6, 7], GREEDY, steered)[0])
    assert steered.wait().outcome == "length"
    assert rows[-12:] == [3] * 12
    stats = engine.stats()
    assert (stats.tokens_plain, stats.tokens_steered, stats.steps_steered) == (6 * 12, 12, 12)
    engine.close()


@pytest.mark.parametrize("views", ["f", "r"])
def test_alone_among_neighbours_and_joining_late_are_the_same(kit: Kit, views: str) -> None:
    engine = engine_of(kit, views, max_rows=8)
    prompts = prompts_for(kit, 10, longest=40)
    params = SAMPLED.replace(max_new_tokens=20, repetition_penalty=1.2)
    alone = [decode(engine, [prompt], params, seed=3)[0].ids for prompt in prompts]
    together = [sink.ids for sink in decode(engine, prompts, params, seed=3)]
    assert together == alone
    # Joining late: each request is submitted from inside the one before, some steps into it.
    pairs = [request(prompt, params, seed=3) for prompt in prompts]
    for (_, sink), (following, _) in pairwise(pairs):
        sink.react = lambda step, f=following: engine.submit(f) if step.index == 4 else None
    engine.submit(pairs[0][0])
    assert [sink.wait().ids for _, sink in pairs] == alone
    engine.close()


def test_mixed_parameters_in_one_batch_do_not_touch_each_other(kit: Kit) -> None:
    engine = engine_of(kit, "r")
    prompt = prompts_for(kit, 1)[0]
    kinds = [
        GREEDY, SAMPLED, SAMPLED.replace(alpha=0.0), GREEDY.replace(rule="detoxigen"),
        SAMPLED.replace(top_p=1.0), SAMPLED.replace(top_k=3), GREEDY.replace(repetition_penalty=2.0),
    ]  # fmt: skip
    alone = [decode(engine, [prompt], params)[0].ids for params in kinds]
    pairs = [request(prompt, params) for params in kinds]
    for req, _ in pairs:
        engine.submit(req)
    assert [sink.wait().ids for _, sink in pairs] == alone
    assert len({tuple(ids) for ids in alone}) >= len(kinds) - 1
    engine.close()


def test_every_token_lies_in_the_generators_nucleus(kit: Kit) -> None:
    engine, oracle = engine_of(kit, "r"), kit.reference("r")
    params = SAMPLED.replace(top_p=0.6, alpha=5.0)
    for prompt in prompts_for(kit, 10):
        sink = decode(engine, [prompt], params)[0]
        gen, _ = oracle.log_probs(prompt, sink.ids, params)
        for i, token in enumerate(sink.ids):
            more_probable = gen[i].exp()[gen[i] > gen[i, token]].sum()
            assert more_probable < params.top_p + 1e-6
    engine.close()


def _dense(step: TokenStep) -> torch.Tensor:
    assert step.distribution is not None
    ids, p = step.distribution
    return torch.zeros(1000).scatter_(0, ids, p)


def _assert_equal_steps(again: list[TokenStep], plain: list[TokenStep]) -> None:
    for a, b in zip(again, plain, strict=True):
        assert (a.token_id, a.index) == (b.token_id, b.index)
        torch.testing.assert_close(_dense(a), _dense(b), atol=1e-5, rtol=0)


def _rewind_once(at: int, back: int) -> Callable[[TokenStep], Rewind | None]:
    left = [Rewind(back)]
    return lambda step: left.pop() if step.index == at and left else None


@pytest.mark.parametrize("views", ["f", "r"])
def test_a_rewound_row_equals_one_that_never_took_the_path(kit: Kit, views: str) -> None:
    engine = engine_of(kit, views)
    params = SAMPLED.replace(repetition_penalty=1.2)
    prompts = prompts_for(kit, 4)
    straight = [sink.steps for sink in decode(engine, prompts, params, keep=True)]
    for back in (1, 3, 6):
        # At the sixth token, take back `back` of them, once; 6 goes back to the end of the prompt.
        pairs = [request(prompt, params, Recorder(_rewind_once(at=5, back=back)), keep=True) for prompt in prompts]
        for req, _ in pairs:
            engine.submit(req)
        for (_, sink), plain in zip(pairs, straight, strict=True):
            _assert_equal_steps(sink.wait().steps[6:], plain[6 - back :])
    assert engine.stats().tokens_rewound == (1 + 3 + 6) * len(prompts)
    engine.close()


def test_a_parked_reply_goes_on_as_if_it_never_stopped(kit: Kit) -> None:
    engine = engine_of(kit, "fr")
    req, plain = request([5, 6, 7], GREEDY, keep=True)
    engine.submit(req)
    neighbour, other = request([9, 8], GREEDY.replace(max_new_tokens=60), keep=True)
    engine.submit(neighbour)
    plain.wait()
    for back in (1, 5, 12):
        req, sink = request([5, 6, 7], GREEDY, keep=True)
        answers: list[Any] = [None, None, None, Rewind(back), None, End("stop")]
        sink.on_end = lambda reason, answers=answers: answers.pop(0)  # type: ignore[method-assign]
        engine.submit(req)
        assert sink.wait().outcome == "stop"
        _assert_equal_steps(sink.steps[: 12 - back] + sink.steps[12:], plain.steps)
    assert len(other.wait().ids) == 60
    assert engine.stats().rows == 0
    engine.close()


def test_a_verdict_holds_for_one_token(kit: Kit) -> None:
    """Sampling and bans of a verdict choose the next token, and those of the request the one behind it."""
    engine = engine_of(kit, "r")
    prompt = [5, 6, 7]
    plain = decode(engine, [prompt], GREEDY.replace(alpha=0.0), keep=True)[0].ids
    hot = Sampling.of(GREEDY.replace(alpha=9.0, rule="dexperts"))

    def react(step: TokenStep) -> Go | Rewind:
        if step.index == 2 and not rewound:
            rewound.append(step.token_id)
            return Rewind(1, hot, frozenset({step.token_id}))
        return Go(banned=frozenset({plain[4]})) if step.index == 3 else Go()

    rewound: list[int] = []
    req, sink = request(prompt, GREEDY, Recorder(react), keep=True)
    engine.submit(req)
    steps = sink.wait().steps
    assert steps[3].index == 2
    assert steps[3].token_id != rewound[0]
    oracle = kit.reference("r")
    reply = [*sink.ids[:2], *sink.ids[3:]]
    own, _ = oracle.distributions(prompt, reply, GREEDY)
    for index, step in enumerate([*steps[:2], *steps[3:]]):
        if index not in (2, 4):
            torch.testing.assert_close(_dense(step)[: kit.vocab_size], own[index].float(), atol=1e-5, rtol=0)
    assert not torch.allclose(_dense(steps[3])[: kit.vocab_size], own[2].float(), atol=1e-3)
    assert plain[4] not in {steps[5].token_id}
    engine.close()


def test_a_verdict_that_steers_what_has_no_rows_to_steer_by_fails_its_request_only(kit: Kit) -> None:
    steering = Recorder(lambda step: Go(Sampling.of(SAMPLED)))
    assert "alpha" in str(alone_fails(engine_of(kit, "r"), SAMPLED.replace(alpha=0.0), steering, beside=SAMPLED))


@pytest.mark.parametrize(("back", "may_rewind"), [(2, True), (1, False)])
def test_a_rewind_that_is_not_to_be_fails_that_request_only(kit: Kit, back: int, may_rewind: bool) -> None:
    """One past the start, and one of a request that said it would not."""
    rewinding = Recorder(lambda step: Rewind(back))
    assert isinstance(alone_fails(engine_of(kit, "r"), SAMPLED, rewinding, may_rewind=may_rewind), EngineError)


def test_end_ids_stop_and_are_not_emitted(kit: Kit) -> None:
    engine = engine_of(kit, "r")
    ids = decode(engine, [[9, 8, 7]], GREEDY)[0].ids
    end = next(token for token in ids[2:] if token not in ids[:2])
    sink = decode(engine, [[9, 8, 7]], GREEDY, end_ids=frozenset({end}))[0]
    assert sink.outcome == "stop"
    assert sink.ids == ids[: ids.index(end)]
    engine.close()


@pytest.mark.parametrize("views", ["r", "fr"])
def test_an_equal_prompt_is_computed_once(kit: Kit, views: str) -> None:
    prompts = prompts_for(kit, 3, shortest=4)
    fresh = engine_of(kit, views, prompt_cache_slots=0)
    expected = [decode(fresh, [prompt], SAMPLED)[0].ids for prompt in prompts]
    fresh.close()
    engine, runner = watched_engine(kit, views, prompt_cache_slots=200)
    for _ in range(2):
        assert [sink.ids for sink in decode(engine, prompts * 3, SAMPLED)] == expected * 3
    assert sum(map(len, runner.begun)) == 3
    # Neither a plain request nor another prompt takes what is not its own; and old ones are forgotten.
    plain = decode(engine, [prompts[0]], SAMPLED.replace(alpha=0.0))[0]
    assert not plain.steps[0].steered
    assert sum(map(len, runner.begun)) == 4
    decode(engine, prompts_for(kit, 12, shortest=20, seed=5), SAMPLED)
    assert 0 < runner.held_slots <= 200
    engine.close()


def test_equal_prompts_join_what_is_being_computed(kit: Kit) -> None:
    engine, runner = watched_engine(kit, "r", prefill_chunk=16, prompt_cache_slots=0)
    long = prompts_for(kit, 1, shortest=200, longest=200)[0]
    expected = decode(engine, [long], GREEDY)[0].ids
    runner.begun.clear()
    sinks = [Recorder() for _ in range(3)]

    def beside(step: TokenStep) -> None:
        if step.index % 2 == 0 and step.index < 6:
            engine.submit(request(long, GREEDY, sinks[step.index // 2])[0])

    engine.submit(request([5, 6], GREEDY.replace(max_new_tokens=60), Recorder(beside))[0])
    assert [sink.wait().ids for sink in sinks] == [expected] * 3
    assert list(map(len, runner.begun)) == [1, 1]
    engine.close()
