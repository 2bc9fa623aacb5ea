"""Views made of text in the engine: the oracle for each place, and the engine's invariants with them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from harness import (
    Recorder,
    check_against_oracle,
    contexts_of,
    decode,
    random_prompts,
    random_streams,
    request,
    torch_engine,
)
from tiny import make_tiny_backbone

from detox_guard.engine import PromptIds, Rewind, TokenStep
from detox_guard.errors import EngineError, PromptError, PromptTooLongError, StepError
from detox_guard.settings import DecodingParams, EngineConfig

if TYPE_CHECKING:
    from detox_guard.models.backbone import Backbone

GREEDY = DecodingParams(temperature=0.0, alpha=1.5, max_new_tokens=8)
EVERY = ["t", "b", "e", "s", "tS", "frbSeT"]


@pytest.fixture
def llama() -> Backbone:
    return make_tiny_backbone("llama", initializer_range=0.2)


@pytest.mark.parametrize("kinds", EVERY)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_equals_the_oracle(kind: str, kinds: str) -> None:
    backbone = make_tiny_backbone(kind, initializer_range=0.2)
    params = GREEDY.replace(rule="bounded" if kind == "llama" else "dexperts")
    check_against_oracle(backbone, random_streams(backbone, kinds), random_prompts(backbone, 12), params)


@pytest.mark.parametrize("kinds", ["e", "s", "tbS"])
def test_a_prompt_longer_than_a_chunk_equals_the_oracle(llama: Backbone, kinds: str) -> None:
    prompts = random_prompts(llama, 3, shortest=40, longest=60)
    check_against_oracle(llama, random_streams(llama, kinds), prompts, GREEDY, prefill_chunk=16)


def test_a_text_is_the_soft_prompt_of_its_embeddings(llama: Backbone) -> None:
    texts = random_streams(llama, "tb")
    embed = llama.model.get_input_embeddings()
    soft = random_streams(llama, "fr")
    for text, one in zip(texts, soft, strict=True):
        one.embeddings.copy_(embed.weight[list(text.ids)].detach()) if len(one) == len(text) else pytest.fail("widths")
    prompts = random_prompts(llama, 4)
    params = GREEDY.replace(temperature=1.0)
    by_text = [sink.ids for sink in decode(torch_engine(llama, texts), prompts, params)]
    assert by_text == [sink.ids for sink in decode(torch_engine(llama, soft), prompts, params)]


@pytest.mark.parametrize("kinds", ["e", "tS"])
def test_alone_and_among_neighbours_are_the_same(llama: Backbone, kinds: str) -> None:
    views, prompts = random_streams(llama, kinds), random_prompts(llama, 7)
    params = GREEDY.replace(temperature=1.0)
    engine = torch_engine(llama, views)
    together = [sink.ids for sink in decode(engine, prompts, params, views=views)]
    alone = torch_engine(llama, views, EngineConfig(prompt_cache_slots=0))
    assert together == [decode(alone, [prompt], params, views=views)[0].ids for prompt in prompts]
    again = [sink.ids for sink in decode(engine, prompts, params, views=views)]  # out of the prompt cache
    assert again == together


@pytest.mark.parametrize("kinds", ["e", "tS"])
def test_a_rewound_row_equals_one_that_never_took_the_path(llama: Backbone, kinds: str) -> None:
    views, prompt = random_streams(llama, kinds), random_prompts(llama, 1, shortest=9)[0]
    engine = torch_engine(llama, views)
    straight = decode(engine, [prompt], GREEDY, views=views)[0].ids
    for back in (1, 5):
        done: list[bool] = []

        def react(step: TokenStep, back: int = back, done: list[bool] = done) -> Rewind | None:
            if step.index != 4 or done:
                return None
            done.append(True)
            return Rewind(back)

        sink = Recorder(react)
        engine.submit(request(prompt, GREEDY, sink, views=views)[0])
        sink.wait()
        assert sink.ids[5:] == straight[5 - back :]
        assert sink.ids[:5] == straight[:5]


def test_prompts_that_differ_in_a_views_context_alone_are_computed_apart(llama: Backbone) -> None:
    views, prompt = random_streams(llama, "s"), random_prompts(llama, 1, shortest=9)[0]
    engine = torch_engine(llama, views)
    one, first = request(prompt, GREEDY, keep=True, views=views)
    two, second = request(prompt, GREEDY, keep=True, views=views)
    two = replace(two, prompt=two.prompt._replace(contexts=((11, 12, 13, 14, *prompt),)))
    for req in (one, two):
        engine.submit(req)
    first.wait(), second.wait()
    apart = [sink.steps[0].distribution for sink in (first, second)]
    assert apart[0] is not None
    assert apart[1] is not None
    assert (apart[0][1] - apart[1][1]).abs().max() > 1e-3


def test_a_request_that_lacks_a_context_fails_and_is_never_decoded_plain(llama: Backbone) -> None:
    engine = torch_engine(llama, random_streams(llama, "s"))
    with pytest.raises((StepError, EngineError)):
        decode(engine, [[5, 6, 7]], GREEDY)
    assert engine.stats().tokens_plain == 0


@pytest.mark.parametrize(("kinds", "beside"), [("t", 5), ("e", 11)])
def test_what_does_not_fit_is_refused_by_name(llama: Backbone, kinds: str, beside: int) -> None:
    views = random_streams(llama, kinds)
    engine = torch_engine(llama, views)
    assert llama.max_positions is not None
    most = llama.max_positions - GREEDY.max_new_tokens - beside
    engine.check(PromptIds((5,) * most, True), GREEDY.max_new_tokens)
    with pytest.raises(PromptTooLongError, match="positions"):
        engine.check(PromptIds((5,) * (most + 1), True), GREEDY.max_new_tokens)
    engine.check(PromptIds((5,) * (most + 1), False), GREEDY.max_new_tokens)


def test_a_context_of_its_own_must_fit_too(llama: Backbone) -> None:
    engine = torch_engine(llama, random_streams(llama, "s"))
    assert llama.max_positions is not None
    most = llama.max_positions - GREEDY.max_new_tokens
    short, new = PromptIds((5,) * 3, True), GREEDY.max_new_tokens
    engine.check(PromptIds((5,) * most, True, ((5,) * most,)), new)
    with pytest.raises(PromptTooLongError, match="positions"):
        engine.check(short._replace(contexts=((5,) * (most + 1),)), new)
    with pytest.raises(PromptError, match="token ids"):
        engine.check(short._replace(contexts=((llama.vocab_size,),)), new)


def test_contexts_are_not_computed_for_who_is_not_steered(llama: Backbone) -> None:
    views = random_streams(llama, "s")
    engine = torch_engine(llama, views)
    plain = GREEDY.replace(alpha=0.0)
    prompt = random_prompts(llama, 1)[0]
    assert decode(engine, [prompt], plain, views=views)[0].ids == decode(torch_engine(llama), [prompt], plain)[0].ids
    assert contexts_of(prompt, views) != []
