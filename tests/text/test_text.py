"""Prompts to ids, ids to text: detokenizing, stop strings, and what is refused (docs/architecture.md, 7)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_tiny_backbone, make_tiny_tokenizer

from detox_guard.errors import PromptError
from detox_guard.text.prompts import ChatPrompt, StopMatcher, TextStream, encode_prompt, prompt_texts

TOKENIZER = make_tiny_tokenizer()
HI = [{"role": "user", "content": "Hi"}]
TEXTS = [
    "plain words, and  two spaces\n\n",
    "emoji 😀🎉👩‍👩‍👧 and ❤️",
    "今天天气很好。日本語",
    "combining e\u0301 a\u0308 n\u0303",
    "Привет — straße «x»",
    " leading space",
]


def pieces(text: str, prompt: str = "Hello there") -> list[str]:
    stream = TextStream(TOKENIZER, TOKENIZER(prompt)["input_ids"])
    return [stream.push(token) for token in TOKENIZER(text)["input_ids"]]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_none_holds_half_a_character(text: str) -> None:
    got = pieces(text)
    assert "".join(got) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in got)


def test_characters_are_really_split_over_tokens_here() -> None:
    assert "" in pieces("日本語 😀")


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_any_text_round_trips(text: str) -> None:
    assert "".join(pieces(text)) == TOKENIZER.decode(TOKENIZER(text)["input_ids"], skip_special_tokens=True)


MARK = "\N{REPLACEMENT CHARACTER}"
SPLIT = "\N{ARABIC LETTER MEEM WITH DOT ABOVE}"  # two bytes, two tokens


@pytest.mark.parametrize("text", [MARK, MARK * 3, f"M{MARK}ller and {MARK}", f"日{MARK}"])
def test_the_replacement_character_is_text_like_any_other_and_does_not_wait(text: str) -> None:
    got = pieces(text)
    assert "".join(got) == text
    assert got[-1]


def test_half_a_character_is_no_text_until_the_rest_comes() -> None:
    stream = TextStream(TOKENIZER, [])
    first, second = TOKENIZER(SPLIT)["input_ids"]
    assert [stream.push(first), stream.whole] == ["", False]
    assert [stream.push(second), stream.whole] == [SPLIT, True]
    stream.rewind(1)
    assert [stream.push(TOKENIZER("a")["input_ids"][0]), stream.whole] == [f"{MARK}a", True]


def test_bytes_that_no_character_ends_with_do_not_wait() -> None:
    stream = TextStream(TOKENIZER, [])
    assert stream.push(TOKENIZER(SPLIT)["input_ids"][1]) == MARK


def test_the_replacement_character_in_bytes_of_a_sentencepiece_vocabulary() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "▁Hi": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    stream = TextStream(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>"), [1])
    assert [stream.push(2 + byte) for byte in (0xEF, 0xBF, 0xBD)] == ["", "", MARK]
    assert stream.push(1) == " Hi"
    assert [stream.push(2 + byte) for byte in (0xC3, 0xA9)] == ["", "é"]


def test_special_tokens_that_mark_calls_are_text_and_no_others() -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "[ARGS]", "[IMG]"]})
    ids = tokenizer('[IMG][TOOL_CALLS]now[ARGS]{"a": 1}<|im_end|>')["input_ids"]
    stream = TextStream(tokenizer, [])
    assert "".join(stream.push(token) for token in ids) == '[TOOL_CALLS]now[ARGS]{"a": 1}'


def test_special_tokens_are_never_text() -> None:
    stream = TextStream(TOKENIZER, [])
    ids = [1, *TOKENIZER("hi")["input_ids"], 2, 0, *TOKENIZER("ho")["input_ids"]]
    assert "".join(stream.push(token) for token in ids) == "hiho"


def test_a_tokenizer_that_drops_leading_spaces_keeps_them_in_a_stream() -> None:
    """SentencePiece-style decoding strips the first space; the prompt's last tokens as context keep it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "▁Hello": 1, "▁big": 2, "▁world": 3}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    assert tokenizer.decode([2, 3]) == "big world"
    stream = TextStream(tokenizer, [1])
    assert [stream.push(2), stream.push(3)] == [" big", " world"]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_stop_strings_are_never_emitted_however_they_straddle(parts: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    out = []
    for part in parts:
        out.append(matcher.push(part))
        # Nothing emitted so far could still turn out to hold a stop string.
        assert not any(stop in "".join(out) for stop in stops)
        if matcher.stopped:
            break
    out.append(matcher.flush())
    whole, text = "".join(parts), "".join(out)
    cuts = [whole.find(stop) for stop in stops if stop in whole]
    if cuts:
        assert matcher.stopped
        assert not any(stop in text for stop in stops)
        assert whole.startswith(text)
    else:
        assert text == whole


def test_a_held_back_beginning_is_text_if_nothing_follows() -> None:
    matcher = StopMatcher(["Observation:"])
    assert matcher.push("Fine. Obser") == "Fine. "
    assert matcher.push("ved") == "Observed"
    assert matcher.push(" Ob") == " "
    assert matcher.flush() == "Ob"


def test_messages_go_straight_to_ids() -> None:
    backbone = make_tiny_backbone("llama")
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "Hi 😀"}]
    ids = encode_prompt(backbone, messages)
    expected = backbone.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ids == backbone.tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert ids.count(1) == 3


@pytest.mark.parametrize(
    ("prompt", "field", "bound"),
    [
        ("", "prompt", "at least one character"),
        (None, "prompt", "a string or a list"),
        (b"bytes", "prompt", "a string or a list"),
        (3.5, "prompt", "a string or a list"),
        ("half \ud83d a pair", "prompt", "without lone surrogates"),
        ([], "messages", "at least one message"),
        (["hi"], "messages[0]", "a mapping"),
        ([{"role": "user"}], "messages[0].content", "a string"),
        ([{"content": "hi"}], "messages[0].role", "a string"),
        ([{"role": "", "content": "hi"}], "messages[0].role", "at least one character"),
        (
            [{"role": "user", "content": "ok"}, {"role": "user", "content": "\udc00"}],
            "messages[1].content",
            "surrogates",
        ),
        ([{"role": "user", "content": 3}], "messages[0].content", "a string"),
        ([{"role": "user", "content": None}], "messages[0].content", "a string"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]", "a part of text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]", "a part of text"),
        ([{"role": "user", "content": "x", "seen": {1}}], "messages[0].seen", "no set"),
        (ChatPrompt(HI, chat_template_kwargs={"tools": []}), "chat_template_kwargs", "variable"),
        (ChatPrompt(HI, chat_template_kwargs={1: 2}), "chat_template_kwargs", "variable"),  # type: ignore[dict-item]
        (ChatPrompt(HI, chat_template_kwargs=["a"]), "chat_template_kwargs", "a mapping"),  # type: ignore[arg-type]
        (ChatPrompt(HI, chat_template_kwargs={"a": {1}}), "chat_template_kwargs.a", "no set"),
    ],
)
def test_prompts_that_are_refused_name_field_value_and_bound(prompt: Any, field: str, bound: str) -> None:
    with pytest.raises(PromptError) as caught:
        encode_prompt(make_tiny_backbone("llama"), prompt)
    assert caught.value.field == field
    assert bound in caught.value.bound
    assert field in str(caught.value)


def test_no_template_and_a_template_that_refuses_are_prompt_errors() -> None:
    backbone = make_tiny_backbone("llama")
    backbone.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(PromptError, match="roles must alternate"):
        encode_prompt(backbone, [{"role": "user", "content": "hi"}])
    import dataclasses

    bare = dataclasses.replace(backbone, has_chat_template=False)
    with pytest.raises(PromptError, match="no chat template"):
        encode_prompt(bare, [{"role": "user", "content": "hi"}])


def test_a_template_without_a_system_role_has_the_user_say_it() -> None:
    """Also what we say there ourselves: the tools, to a template that knows none."""
    backbone = make_tiny_backbone("llama")
    backbone.tokenizer.chat_template = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('user and assistant must alternate') }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    )
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "So"},
    ]
    ids = encode_prompt(backbone, [{"role": "system", "content": "Be kind."}, *turns])
    assert backbone.tokenizer.decode(ids) == "[user]Be kind.\n\nHi[assistant]Yes?[user]So"
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
    said = backbone.tokenizer.decode(encode_prompt(backbone, ChatPrompt(turns, [tool])))
    assert said.startswith("[user]You may call functions")
    assert said.endswith("\n\nHi[assistant]Yes?[user]So")
    ids = encode_prompt(backbone, [{"role": "system", "content": "Be kind."}, turns[1]])
    assert backbone.tokenizer.decode(ids) == "[user]Be kind.[assistant]Yes?"


def test_what_is_read_has_the_words_of_calls() -> None:
    arguments: dict[str, Any] = {"lines": ["One.", {"b": "Two."}], "count": 3}
    call: dict[str, Any] = {"id": "c1", "type": "function", "function": {"name": "post", "arguments": arguments}}
    said: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    assert prompt_texts(ChatPrompt(said)) == ["Hi", "", "lines", "One.", "b", "Two.", "count"]
    call["function"]["arguments"] = json.dumps(arguments)
    said[0]["content"] = [{"type": "text", "text": "Hi"}, "there"]
    documents = [{"title": "T", "text": "Read."}]
    assert prompt_texts(ChatPrompt(said, chat_template_kwargs={"documents": documents, "mode": "on"})) == [
        "Hi\nthere", "", "lines", "One.", "b", "Two.", "count", "title", "T", "text", "Read.",
    ]  # fmt: skip


def test_templates_of_which_none_is_the_default_are_a_prompt_error() -> None:
    backbone = make_tiny_backbone("llama")
    backbone.tokenizer.chat_template = {"one": "{{ messages }}", "two": "{{ messages }}"}
    with pytest.raises(PromptError, match="chat template"):
        encode_prompt(backbone, [{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("arguments", ['{"a": NaN}', '{"a": 1e999}', '{"a": 1} and more', "[1]"])
def test_arguments_as_text_must_be_json(arguments: str) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "post", "arguments": arguments}}
    with pytest.raises(PromptError, match="arguments"):
        encode_prompt(make_tiny_backbone("llama"), [{"role": "assistant", "content": None, "tool_calls": [call]}])
