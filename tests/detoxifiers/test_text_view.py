"""Texts as detoxifiers: what they may be, their tokens, and whole replies steered by them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
from harness import contexts_of
from tiny import make_tiny_backbone
from tokenizers.processors import TemplateProcessing

from detox_guard import ChatPrompt, DecodingParams, Detoxifier, DetoxiGen, GuardPolicy, SteeringStream, TextView
from detox_guard.detoxifiers.base import TokenPrefix, ids_behind, own_contexts
from detox_guard.errors import DetoxifierError, DetoxifierMismatchError, InvalidParamsError, PromptError
from detox_guard.text.prompts import encode_prompt, with_system_text

if TYPE_CHECKING:
    from detox_guard.models.backbone import Backbone

RUDE, KIND = "The following text is rude:\n\n", "The following text is kind:\n\n"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who came?"}]
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather.", "parameters": {"type": "object", "properties": {}}},
}


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"text": ""}, "text"),
        ({"text": " \n"}, "text"),
        ({"text": 3}, "text"),
        ({"text": "half \ud800"}, "text"),
        ({"text": "x", "place": "middle"}, "place"),
        ({"text": "x", "place": "front", "tail": 3}, "tail"),
        ({"text": "x", "place": "reply", "tail": -1}, "tail"),
        ({"text": "x", "place": "reply", "tail": True}, "tail"),
        ({"text": "x", "weight": 0}, "weight"),
    ],
)
def test_bad_values_are_named(given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidParamsError) as refused:
        Detoxifier.from_text(**given)
    assert refused.value.field == field


def test_it_is_a_stream_with_a_signed_weight(tiny_llama: Backbone) -> None:
    stream = Detoxifier.from_text(RUDE, "reply", -0.5, tail=4)
    assert stream == SteeringStream(TextView(RUDE, "reply", 4), -0.5)
    ids = tuple(tiny_llama.tokenizer(RUDE, add_special_tokens=False)["input_ids"])
    assert stream.view(tiny_llama) == TokenPrefix(ids, -0.5, "reply", 4)
    assert stream.id.startswith("-0.5:text:")
    others = [
        Detoxifier.from_text(KIND, "reply", tail=4),
        Detoxifier.from_text(RUDE),
        Detoxifier.from_text(RUDE, "reply"),
    ]
    assert len({stream.detoxifier.sha256, *(other.detoxifier.sha256 for other in others)}) == 4


def test_a_text_in_front_begins_as_texts_of_this_model_do() -> None:
    backbone = make_tiny_backbone("llama")
    bare = tuple(backbone.tokenizer(RUDE, add_special_tokens=False)["input_ids"])
    backbone.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    assert Detoxifier.from_text(RUDE, "front").view(backbone).ids == (1, *bare)  # type: ignore[union-attr]
    assert Detoxifier.from_text(RUDE, "reply").view(backbone).ids == bare  # type: ignore[union-attr]


def test_a_text_that_leaves_no_room_or_no_token_is_refused(tiny_llama: Backbone) -> None:
    text = TextView("word " * 40)
    with pytest.raises(DetoxifierMismatchError, match="no room"):
        text.validate(dataclasses.replace(tiny_llama, max_positions=40))
    with pytest.raises(DetoxifierError, match="vocabulary"):
        text.validate(dataclasses.replace(tiny_llama, vocab_size=5))


def test_what_stands_behind_the_context() -> None:
    assert ids_behind(TokenPrefix((7, 8), place="reply", tail=2), [1, 2, 3]) == (7, 8, 2, 3)
    assert ids_behind(TokenPrefix((7, 8), place="reply", tail=9), [1, 2, 3]) == (7, 8, 1, 2, 3)
    assert ids_behind(TokenPrefix((7, 8), place="reply"), [1, 2, 3]) == (7, 8)
    views = [TokenPrefix((7,), place="system"), TokenPrefix((8,)), TokenPrefix((9,), place="system")]
    assert own_contexts(views, contexts_of([1, 2], views)).keys() == {0, 2}
    with pytest.raises(ValueError):
        own_contexts(views, [[1]])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Once", "Be rude.\n\nOnce"),
        (CHAT[1:], [{"role": "system", "content": "Be rude."}, CHAT[1]]),
        (CHAT, [{"role": "system", "content": "Be brief.\n\nBe rude."}, CHAT[1]]),
    ],
)
def test_a_system_text_is_a_message_or_joins_the_one_there_is(tiny_llama: Backbone, prompt: Any, expected: Any) -> None:
    assert encode_prompt(tiny_llama, with_system_text(prompt, "Be rude.")) == encode_prompt(tiny_llama, expected)


def test_a_system_text_keeps_tools_and_names_bad_messages_by_their_own_place(tiny_llama: Backbone) -> None:
    chat = ChatPrompt(CHAT, (WEATHER,), {"note": "x"})
    ours = with_system_text(chat, "Be rude.")
    assert isinstance(ours, ChatPrompt)
    assert (ours.tools, ours.chat_template_kwargs) == (chat.tools, chat.chat_template_kwargs)
    with pytest.raises(PromptError) as refused:
        with_system_text([{"role": "user"}], "Be rude.")
    assert refused.value.field == "messages[0].content"


PROMPTS: dict[str, Any] = {
    "plain": "So, she is",
    "chat": CHAT[1:],
    "system": CHAT,
    "tools": ChatPrompt(CHAT, (WEATHER,)),
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_all_places_at_once_steer_every_kind_of_prompt(prompt: Any) -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2, max_position_embeddings=2048)
    streams = [
        Detoxifier.from_text(RUDE, "system", -1.0),
        Detoxifier.from_text(KIND, "front", 1.0),
        Detoxifier.from_text(RUDE, "reply", -0.5, tail=8),
    ]
    params = DecodingParams(alpha=3.0, calm_share=1, max_new_tokens=6, temperature=0.0)
    with DetoxiGen(backbone, streams, params=params) as model:
        one = model.generate(prompt)
        assert one.steering.detoxifiers == model.detoxifier_ids == tuple(stream.id for stream in streams)
        assert one.steering.mean_kl_steering > 0
        assert [reply.text for reply in model.batch([prompt, "Another", prompt])][::2] == [one.text] * 2
        plain = model.generate(prompt, alpha=0.0)
        assert plain.steering.detoxifiers == ()
        assert plain.usage.prompt_tokens == one.usage.prompt_tokens
        guarded = model.generate(prompt, guard=GuardPolicy(on_exhausted="stop"))
        assert guarded.usage.prompt_tokens == one.usage.prompt_tokens
