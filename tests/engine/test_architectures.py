"""Models whose layers are not all plain attention, on tiny random models far past their windows.

The bar families are held, row by row and step by step, against whole forward passes: with soft prompts in front and
before the reply, among neighbours, late, rewound, and put aside. `python -m detox_benchmarks registry` does the same
for every type of transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from detox_benchmarks.registry.check import TOLERANCE, largest_error
from detox_benchmarks.registry.shapes import tiny_config, tiny_model, tiny_tokenizer
from harness import check_against_oracle, decode, random_prompts, random_streams, request, torch_engine
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from detox_guard.engine import End, Rewind
from detox_guard.engine.torch.states import CHECKPOINT
from detox_guard.errors import UnsupportedBackboneError
from detox_guard.models.backbone import from_model
from detox_guard.settings import DecodingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.engine import TokenStep
    from detox_guard.models.backbone import Backbone
    from detox_guard.models.checks import Layout

GREEDY = DecodingParams(temperature=0.0, alpha=1.5, rule="dexperts", max_new_tokens=12)
FAMILIES = (
    "llama", "llama4_text", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text", "gemma2", "gemma3_text",
    "gemma3n_text", "gemma4_text", "mistral", "ministral", "mixtral", "phi3", "gpt_oss", "granite", "granitemoehybrid",
    "olmo2", "olmo3", "smollm3", "glm4", "cohere2", "exaone4", "lfm2", "nemotron_h", "falcon_h1", "deepseek_v3",
    "starcoder2", "gpt2", "opt", "gpt_neox", "falcon",
)  # fmt: skip


def tiny(kind: str, **fields: Any) -> Backbone:
    return from_model(tiny_model(tiny_config(kind, **fields)), tiny_tokenizer(), id=f"tiny-{kind}")


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_row_is_that_of_a_whole_pass(kind: str) -> None:
    assert largest_error(tiny(kind)) <= TOLERANCE


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("gpt_oss", "padded"),  # windows, and sinks
        ("gemma3n_text", "rows"),  # windows, and layers that read the keys of others
        ("gemma3", "padded"),  # a wrapper, run as it was loaded
        ("gemma4", "padded"),  # one whose layers look token ids up
        ("qwen2_5_vl", "padded"),  # one with positions of three kinds
        ("qwen3_vl", "padded"),  # one that transformers does not count among the causal models
        ("bloom", "rows"),  # ALiBi
        ("mamba", "rows"),  # a recurrence that must be read token by token
        ("deepseek_v32", "rows"),  # sparse attention with an indexer's keys
        ("roberta", "rows"),  # positions behind the padding's
        ("kosmos-2", "rows"),  # the same, inside a model that does not run without an image
        ("minimax", "alone"),
        ("deepseek_v4", "alone"),  # token ids only, its own cache
        ("openai-gpt", "recompute"),
        ("blt", "recompute"),  # token ids only
    ],
)
def test_each_way_to_run_a_model(kind: str, layout: Layout) -> None:
    backbone = tiny(kind)
    assert backbone.running.layout == layout
    assert largest_error(backbone) <= TOLERANCE


@pytest.mark.parametrize("layers", ["full_attention", "sliding_attention"])
@pytest.mark.parametrize("kind", ["mistral", "qwen3_moe", "dots1"])
def test_windows_are_those_that_the_model_has_whatever_its_config_says_of_layers(kind: str, layers: str) -> None:
    """Mistral's layers all have the window; those of DOTS have one where the config says so."""
    kinds = ["full_attention", layers] * 2
    backbone = tiny(kind, sliding_window=8, use_sliding_window=True, layer_types=kinds)
    assert backbone.running.layout == "padded"
    assert largest_error(backbone) <= TOLERANCE


def test_a_wrapper_is_run_as_its_text_model_attends() -> None:
    """gpt-oss has no `sdpa`, so a wrapper that has one takes another kind of mask than its text model."""
    text = tiny_config("gpt_oss").to_dict()
    backbone = from_model(tiny_model(tiny_config("internvl", text_config=text)), tiny_tokenizer(), id="tiny")
    config = backbone.model.config
    assert (config._attn_implementation, config.text_config._attn_implementation) == ("sdpa", "eager")
    assert largest_error(backbone) <= TOLERANCE
    other = tiny_model(tiny_config("gemma3"))
    other.set_attn_implementation({"text_config": "flex_attention"})
    with pytest.raises(UnsupportedBackboneError, match="flex_attention"):
        from_model(other, tiny_tokenizer(), id="tiny")


@pytest.mark.parametrize("kind", ["olmo3", "falcon_h1", "lfm2", "bloom"])
def test_the_engine_equals_the_oracle(kind: str) -> None:
    backbone = tiny(kind)
    streams = random_streams(backbone, "fr", scale=0.3)
    # Some layers compute in float32 whatever the model's numbers are, so the oracle is no better there.
    check_against_oracle(backbone, streams, random_prompts(backbone, 5), GREEDY, tolerance=TOLERANCE)


@pytest.mark.parametrize("kind", ["granitemoehybrid", "llama4_text"])
@pytest.mark.parametrize("taken_back", [1, CHECKPOINT - 1, CHECKPOINT + 20])
@pytest.mark.parametrize("alpha", [0.0, 1.5])  # the only row of the batch, and two
def test_a_rewind_past_a_checkpoint_leaves_no_trace(kind: str, taken_back: int, alpha: float) -> None:
    backbone = tiny(kind)
    engine = torch_engine(backbone, random_streams(backbone, "r", scale=0.3))
    params = GREEDY.replace(alpha=alpha, max_new_tokens=2 * CHECKPOINT + 4, top_p=1.0)
    prompt = random_prompts(backbone, 1)[0]
    (plain,) = decode(engine, [prompt], params, keep=True)
    asked, again = request(prompt, params, keep=True)
    turn = 2 * CHECKPOINT + 1

    def back_once(step: object) -> Rewind | None:
        return Rewind(taken_back) if len(again.steps) == turn else None

    again.react = back_once
    engine.submit(asked)
    again.wait()
    assert_equal_steps(again.steps[: turn - taken_back] + again.steps[turn:], plain.steps)
    engine.close()


@pytest.mark.parametrize("kind", ["granitemoehybrid", "lfm2", "mamba", "minimax", "openai-gpt"])
@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_a_parked_reply_is_rewound_like_one_that_was_never_parked(kind: str, alpha: float) -> None:
    """Twice, after an end token; the second time to before it was parked first, and past a checkpoint."""
    backbone = tiny(kind)
    engine = torch_engine(backbone, random_streams(backbone, "b"))
    params = DecodingParams(alpha=alpha, rule="dexperts", max_new_tokens=CHECKPOINT + 16)
    prompt = random_prompts(backbone, 1)[0]
    (plain,) = decode(engine, [prompt], params)
    length, end = max((plain.ids.index(token), token) for token in plain.ids)
    assert length > CHECKPOINT + 4
    replies = []
    for hold in (0, 3):
        asked, sink = request(prompt, params, keep=True, end_ids=frozenset({end}))
        once, twice = (Rewind(back, banned=frozenset({end})) for back in (1, length - 2))
        answers: list[Any] = [*[None] * hold, once, *[None] * hold, twice, *[None] * hold, End("stop")]
        sink.on_end = lambda reason, answers=answers: answers.pop(0)  # type: ignore[method-assign]
        engine.submit(asked)
        assert sink.wait().outcome == "stop"
        assert sink.ids[:length] == plain.ids[:length]
        replies.append(sink.steps)
    assert engine.stats().tokens_rewound == 2 * (length - 1)
    assert_equal_steps(*replies)
    engine.close()


def assert_equal_steps(some: Sequence[TokenStep], others: Sequence[TokenStep]) -> None:
    """The same tokens, from the same distributions."""
    for step, other in zip(some, others, strict=True):
        assert (step.token_id, step.index) == (other.token_id, other.index)
        assert step.distribution is not None
        assert other.distribution is not None
        (ids, p), (other_ids, other_p) = step.distribution, other.distribution
        assert (p[ids.argsort()] - other_p[other_ids.argsort()]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("kind", ["gemma3n_text", "deepseek_v4"])
def test_a_soft_prompt_is_refused_by_name_where_layers_look_ids_up(kind: str) -> None:
    backbone = tiny(kind)
    with pytest.raises(UnsupportedBackboneError, match=r"token ids.*virtual tokens") as caught:
        torch_engine(backbone, random_streams(backbone, "r"))
    assert "text" in caught.value.hint
    engine = torch_engine(backbone, [])
    assert len(decode(engine, [[5, 6, 7]], GREEDY.replace(alpha=0.0))[0].ids) == GREEDY.max_new_tokens
    engine.close()


def test_the_families_are_types_of_transformers() -> None:
    assert set(FAMILIES) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
