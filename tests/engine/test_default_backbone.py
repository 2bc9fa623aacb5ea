"""The embedded default backbone with the shipped detoxifier: the oracle, `model.generate`, and real text."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch
from harness import decode, random_streams, torch_engine
from reference import Reference

from detox_guard import DecodingParams, DetoxiGen
from detox_guard.detoxifiers.resolve import as_streams

if TYPE_CHECKING:
    from detox_guard.detoxifiers.base import View
    from detox_guard.models.backbone import Backbone

OPENINGS = [
    "The museum opens at nine and", "So, I'm starting to think she's full of", "You are such a", "Once upon a time,",
    "My neighbour said that the dog", "In 1969 two people", "I can't believe he would", "The recipe calls for",
    "Nobody on this team ever", "Dear customer, we are", "What a waste of", "The river rises in",
    "He walked in late again and", "They told the children to", "Water boils when", "Shut up and",
    "The minister's speech was", "If you ask me, people who", "def add(a, b):", "Yesterday 😀 we",
]  # fmt: skip
GREEDY = DecodingParams(temperature=0.0, alpha=2.0, max_new_tokens=10)


@pytest.fixture(scope="module")
def unpacked(default_backbone: Backbone) -> Backbone:
    """A copy that no engine has packed."""
    return dataclasses.replace(default_backbone, model=copy.deepcopy(default_backbone.model))


@pytest.fixture(scope="module")
def streams(default_backbone: Backbone) -> list[View]:
    (shipped,) = as_streams(None, default_backbone)
    return [shipped.view(default_backbone)]


@pytest.fixture(scope="module")
def prompts(default_backbone: Backbone) -> list[list[int]]:
    return [default_backbone.tokenizer(text)["input_ids"] for text in OPENINGS]


@pytest.mark.parametrize(("which", "rule"), [("shipped", "bounded"), ("shipped", "dexperts"), ("front", "detoxigen")])
def test_twenty_prompts_equal_the_float64_oracle(
    unpacked: Backbone, streams: list[View], prompts: list[list[int]], which: str, rule: str
) -> None:
    """Tokens equal; probabilities within 1e-4: thirty layers' fp32 rounding times the rule's gain (3.6e-5 was seen)."""
    if which == "front":
        streams = random_streams(unpacked, "f", scale=0.1)
    oracle = Reference.of(unpacked.model, streams)
    oracle.edge = 3e-5  # a flat nucleus of thousands of tokens adds up more rounding
    engine = torch_engine(dataclasses.replace(unpacked, model=copy.deepcopy(unpacked.model)), streams)
    params = GREEDY.replace(rule=rule)
    for prompt, sink in zip(prompts, decode(engine, prompts, params, keep=True), strict=True):
        p_ref, unsure = oracle.distributions(prompt, sink.ids, params)
        for step, ref, close in zip(sink.steps, p_ref, unsure, strict=True):
            assert step.token_id == ref.argmax()
            assert step.distribution is not None
            ids, p = step.distribution
            dense = torch.zeros_like(ref).scatter_(0, ids, p.double())
            bound = 5e-3 if close else 1e-4
            assert (dense - ref).abs().max() <= bound
    engine.close()


def test_alpha_zero_equals_model_generate(unpacked: Backbone, streams: list[View], prompts: list[list[int]]) -> None:
    packed = dataclasses.replace(unpacked, model=copy.deepcopy(unpacked.model))
    engine = torch_engine(packed, streams)
    for prompt, sink in zip(prompts, decode(engine, prompts, GREEDY.replace(alpha=0.0)), strict=True):
        ids = torch.tensor([prompt])
        out = unpacked.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=10,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert sink.ids == out[0, len(prompt) :].tolist()
    engine.close()


def test_from_pretrained_with_nothing_serves_prompts_and_chat(default_backbone: Backbone) -> None:
    with DetoxiGen.from_pretrained(dtype="float32") as model:
        assert model.params.alpha > 0
        r = model.generate("The museum opens at nine and", max_new_tokens=12, seed=1)
        assert r.usage.completion_tokens > 0
        assert r.trace is not None
        assert r.trace.mean_kl_detoxifier > 0.1
        messages = [{"role": "user", "content": "Say hello in five words."}]
        chunks = list(model.stream(messages, max_new_tokens=16, seed=1))
        assert "<|im" not in "".join(chunk.text for chunk in chunks)
        assert model.generate(messages, max_new_tokens=16, seed=1).text == "".join(chunk.text for chunk in chunks)
