"""The torch runner under the engine, against the float64 oracle and `model.generate`."""

from __future__ import annotations

import copy

import pytest
import torch
from harness import check_against_oracle, decode, random_prompts, random_streams, torch_engine
from tiny import make_tiny_backbone

from detox_guard.settings import DecodingParams

GREEDY = DecodingParams(temperature=0.0, alpha=1.5, max_new_tokens=12)
SAMPLED = DecodingParams(temperature=1.0, alpha=1.5, max_new_tokens=12)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("streams", ["f", "r"])
def test_greedy_equals_the_two_pass_oracle_on_200_prompts(kind: str, streams: str) -> None:
    backbone = make_tiny_backbone(kind, initializer_range=0.2)
    params = GREEDY.replace(rule="detoxigen" if streams == "f" else "dexperts")
    check_against_oracle(backbone, random_streams(backbone, streams), random_prompts(backbone, 100), params)


@pytest.mark.parametrize("rule", ["detoxigen", "dexperts", "bounded"])
@pytest.mark.parametrize(
    ("streams", "changes"),
    [
        ("f", {"temperature": 0.7, "top_p": 0.8}),
        ("r", {"top_k": 7}),
        ("r", {"repetition_penalty": 1.3, "temperature": 1.4}),
        ("f", {"plausibility": 0.1, "alpha": 3.0}),
        ("frR", {"top_p": 1.0}),
        ("fF", {"top_p": 0.5, "alpha": 6.0}),
    ],
)
def test_sampled_distributions_equal_the_oracle(rule: str, streams: str, changes: dict[str, float]) -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    params = SAMPLED.replace(rule=rule, **changes)
    check_against_oracle(backbone, random_streams(backbone, streams), random_prompts(backbone, 12), params)


def test_a_sliding_window_model_equals_the_oracle_past_its_window() -> None:
    """Virtual tokens count as tokens inside the window, whichever place they have."""
    backbone = make_tiny_backbone("mistral", initializer_range=0.2, sliding_window=8)
    assert backbone.window == 8
    prompts = random_prompts(backbone, 6, shortest=3, longest=40)
    check_against_oracle(backbone, random_streams(backbone, "frtes"), prompts, GREEDY)


@pytest.mark.parametrize("streams", ["f", "r"])
def test_a_prompt_longer_than_a_chunk_equals_the_oracle(streams: str) -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    prompts = random_prompts(backbone, 3, shortest=50, longest=70)
    check_against_oracle(backbone, random_streams(backbone, streams), prompts, GREEDY, prefill_chunk=16)


def test_eager_attention_equals_the_oracle() -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    backbone.model.set_attn_implementation("eager")
    check_against_oracle(backbone, random_streams(backbone, "fr"), random_prompts(backbone, 6), GREEDY)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_alpha_zero_equals_model_generate(kind: str) -> None:
    backbone = make_tiny_backbone(kind, initializer_range=0.2)
    plain = copy.deepcopy(backbone.model)
    engine = torch_engine(backbone, random_streams(backbone, "f"))
    prompts = random_prompts(backbone, 60, shortest=2)
    params = GREEDY.replace(alpha=0.0, repetition_penalty=1.1)
    for prompt, sink in zip(prompts, decode(engine, prompts, params), strict=True):
        ids = torch.tensor([prompt])
        out = plain.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None,
            pad_token_id=0, repetition_penalty=1.1,
        )  # fmt: skip
        assert sink.ids == out[0, len(prompt) :].tolist()
    assert engine.stats().steps_steered == 0
    engine.close()


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30, 1e-6])
@pytest.mark.parametrize("rule", ["detoxigen", "dexperts", "bounded"])
def test_temperatures_that_float32_cannot_hold_are_as_good_as_zero(temperature: float, rule: str) -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    engine = torch_engine(backbone, random_streams(backbone, "r"))
    params = SAMPLED.replace(temperature=temperature, rule=rule, top_p=1e-300, plausibility=5e-324)
    greedy = GREEDY.replace(rule=rule, top_p=1e-300)
    prompts = random_prompts(backbone, 4)
    cold, plain = ([sink.ids for sink in decode(engine, prompts, p)] for p in (params, greedy))
    assert cold == plain
    for odd in ({"top_p": 1.0}, {"alpha": 5e-324}, {"alpha": 100.0, "top_p": 1.0}, {"repetition_penalty": 0.01}):
        assert all(sink.outcome == "length" for sink in decode(engine, prompts, params.replace(**odd)))
    engine.close()
