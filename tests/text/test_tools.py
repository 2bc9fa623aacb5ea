"""Tools: what a prompt says of them, and what is read back from a reply, whole and in pieces."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHATML, make_tiny_backbone

from detox_guard import (
    ChatPrompt,
    DetoxiGen,
    Grammar,
    InvalidParamsError,
    PromptError,
    ToolCall,
    ToolCallStream,
    parse_tool_calls,
)
from detox_guard.text.prompts import encode_prompt
from detox_guard.text.tools import tool_format

if TYPE_CHECKING:
    from detox_guard.models.backbone import Backbone


def tool(name: str, **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": parameters}}


WEATHER = tool("weather", type="object", properties={"city": {"enum": ["Rome", "Oslo"]}}, required=["city"])
NUMBER = {"n": {"type": "integer", "maximum": 99}}
ADD = tool(
    "add",
    type="object",
    properties={k: {"$ref": "#/$defs/n"} for k in "ab"},
    required=["a", "b"],
    **{"$defs": NUMBER},
)
NOW = {"type": "function", "function": {"name": "now"}}
HISTORY = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Rome and Oslo?"},
    {"role": "assistant", "content": "", "tool_calls": [
        {"id": "a1", "type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
        for city in ("Rome", "Oslo")
    ]},
    {"role": "tool", "tool_call_id": "a1", "name": "weather", "content": "sun"},
    {"role": "tool", "tool_call_id": "a2", "name": "weather", "content": "snow"},
]  # fmt: skip
# Shaped like those of the models they are named after.
HERMES = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    "{% for call in message.tool_calls or [] %}{{ '<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    '{% if tools %}Answer {"name": function name, "parameters": dictionary}. {{ tools | tojson }}{% endif %}' + CHATML
)
MISTRAL = "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}{# [TOOL_CALLS] #}" + CHATML


def backbone(template: str = CHATML) -> Backbone:
    made = make_tiny_backbone("llama", max_position_embeddings=4096)
    made.tokenizer.chat_template = template
    return made


def said(made: Backbone, prompt: Any) -> str:
    return str(made.tokenizer.decode(encode_prompt(made, prompt)))


# --- telling


def test_a_template_that_knows_tools_renders_them_itself() -> None:
    made = backbone(HERMES)
    text = said(made, ChatPrompt(HISTORY, (WEATHER,)))
    expected = made.tokenizer.apply_chat_template(HISTORY, tools=[WEATHER], add_generation_prompt=True, tokenize=False)
    assert text == expected
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}' in text
    assert DetoxiGen(made).supports_tools


def test_another_is_told_in_plain_messages() -> None:
    made = backbone()
    text = said(made, ChatPrompt(HISTORY, (WEATHER, NOW)))
    system, user, assistant, results, opened = text.split("<|im_start|>")[1:]
    assert system.startswith("system\nBe kind.\n\nYou may call")
    assert json.dumps(WEATHER) in system
    assert json.dumps(NOW) in system
    assert user == "user\nRome and Oslo?<|im_end|>\n"
    assert [call.arguments for call in parse_tool_calls(assistant)[1]] == [{"city": "Rome"}, {"city": "Oslo"}]
    assert results == (
        "user\n<tool_response>\nsun\n</tool_response>\n<tool_response>\nsnow\n</tool_response><|im_end|>\n"
    )
    assert opened == "assistant\n"
    assert not DetoxiGen(made).supports_tools


def test_without_tools_a_prompt_is_its_messages() -> None:
    made = backbone()
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}]
    assert encode_prompt(made, ChatPrompt(messages)) == encode_prompt(made, messages)
    assert DetoxiGen(made).count_tokens(ChatPrompt(messages)) == len(encode_prompt(made, messages))


def test_tools_get_a_system_message_where_there_is_none() -> None:
    text = said(backbone(), ChatPrompt([{"role": "user", "content": "Hi"}], (NOW,)))
    assert text.startswith("<|im_start|>system\nYou may call")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (ChatPrompt([]), "messages"),
        (ChatPrompt("hi"), "messages"),  # type: ignore[arg-type]
        (ChatPrompt([{"role": "tool"}]), "messages[0].content"),
        (
            ChatPrompt([HISTORY[1]], [{"type": "function", "function": {"name": "f", "parameters": {"default": {1}}}}]),
            "tools[0].function",
        ),
        (ChatPrompt([HISTORY[1], {**HISTORY[2], "tool_calls": ["x"]}]), "messages[1].tool_calls[0]"),
        (
            ChatPrompt([{**HISTORY[2], "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]),
            "messages[0].tool_calls[0].function.arguments",
        ),
        (ChatPrompt(HISTORY, ({"name": "f"},)), "tools[0]"),
        (ChatPrompt(HISTORY, (WEATHER, tool("f", type="string"))), "tools[1].function.parameters"),
    ],
)
def test_prompts_that_are_refused_name_the_field(prompt: ChatPrompt, field: str) -> None:
    with pytest.raises((PromptError, InvalidParamsError)) as caught:
        encode_prompt(backbone(), prompt)
    assert caught.value.field == field


# --- forcing


@pytest.mark.parametrize(
    ("template", "begins"),
    [(CHATML, "<tool_call>\n{"), (HERMES, "<tool_call>\n{"), (LLAMA, '{"name": '), (MISTRAL, '[{"name": ')],
    ids=["fallback", "hermes", "llama", "mistral"],
)
def test_a_forced_call_is_one_that_is_read_back(template: str, begins: str) -> None:
    with DetoxiGen(backbone(template)) as model:
        names = set()
        for seed in range(8):
            params = model.params.replace(grammar=Grammar.tool_calls([WEATHER, ADD, NOW]), seed=seed, temperature=9.0)
            reply = model.generate(ChatPrompt(HISTORY, (WEATHER, ADD, NOW)), params)
            assert reply.finish_reason == "stop"
            assert reply.text.startswith(begins)
            content, (call,), invalid = parse_tool_calls(reply.text)
            assert (content, invalid) == ("", [])
            names.add(call.name)
            keys = {"weather": {"city"}, "add": {"a", "b"}, "now": set()}[call.name]
            assert set(call.arguments) == keys
            assert call.name != "add" or max(call.arguments.values()) <= 99
        assert len(names) > 1
        only = model.generate("Hi", grammar=Grammar.tool_calls([WEATHER, ADD, NOW], "add"), seed=1)
        assert parse_tool_calls(only.text)[1][0].name == "add"


def test_names_that_need_escaping_are_forced_too() -> None:
    odd = 'é "x"\\'
    with DetoxiGen(backbone()) as model:
        reply = model.generate("Hi", grammar=Grammar.tool_calls([tool(odd)]), seed=1)
    assert parse_tool_calls(reply.text)[1][0].name == odd


def test_a_template_with_tools_of_an_unknown_kind_is_written_to_as_hermes() -> None:
    assert tool_format("{{ tools }}") == tool_format(None)


# --- reading


def calls(text: str) -> tuple[str, list[tuple[str, dict[str, Any]]], list[str]]:
    content, found, invalid = parse_tool_calls(text)
    return content, [(call.name, call.arguments) for call in found], invalid


F = '{"name": "f", "arguments": {"x": 1}}'
BLOCK = f"<tool_call>\n{F}\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ("", [], [])),
        ("Just words. ", ("Just words. ", [], [])),
        ("a < b and <tool> is text", ("a < b and <tool> is text", [], [])),
        (BLOCK, ("", [("f", {"x": 1})], [])),
        (f" Sure!\n{BLOCK}\n{BLOCK}\n", (" Sure!", [("f", {"x": 1})] * 2, [])),
        (f"{BLOCK} and more", (" and more", [("f", {"x": 1})], [])),
        (f"<tool_call>{F}", ("", [("f", {"x": 1})], [])),
        (f"<tool_call>[{F}, {F}]</tool_call>", ("", [("f", {"x": 1})] * 2, [])),
        ('<tool_call>{"name": "f", "arguments": "{\\"x\\": 2}"}</tool_call>', ("", [("f", {"x": 2})], [])),
        ('<tool_call>{"name": "f", "arguments": {"s": "</tool_call>"}}</tool_call>ok',
         ("ok", [("f", {"s": "</tool_call>"})], [])),
        ('{"name": "f", "parameters": {"x": 1}}', ("", [("f", {"x": 1})], [])),
        (f"[TOOL_CALLS] [{F}, {F}]", ("", [("f", {"x": 1})] * 2, [])),
        (f" [{F}]", ("", [("f", {"x": 1})], [])),
        ('{"name": "Ann", "age": 3}', ('{"name": "Ann", "age": 3}', [], [])),
        ('{"answer": 3}', ('{"answer": 3}', [], [])),
        (f'{{"name": "Ann"}} {BLOCK}', ('{"name": "Ann"}', [("f", {"x": 1})], [])),
        ("a <tool_call>{'name': 1}</tool_call> b", ("a b", [], ["<tool_call>{'name': 1}</tool_call>"])),
        ("<tool_call>{\"name\": \"f\"", ("", [], ['<tool_call>{"name": "f"'])),
        ("<tool_call></tool_call>", ("", [], ["<tool_call></tool_call>"])),
        ("[TOOL_CALLS] nonsense", ("", [], ["[TOOL_CALLS] nonsense"])),
        ('<tool_call>{"name": "f", "arguments": 3}', ("", [], ['<tool_call>{"name": "f", "arguments": 3}'])),
        ("<tool_call>" + "[" * 100_000, ("", [], ["<tool_call>" + "[" * 100_000])),
    ],
)  # fmt: skip
def test_what_is_read_from_a_reply(text: str, expected: Any) -> None:
    assert calls(text) == expected


PIECES = st.sampled_from(
    [BLOCK, F, f"[{F}]", "[TOOL_CALLS]", "<tool_call>", "</tool_call>", "<tool", "_call>", "<", *' \n"\\{`;[', "word",
     "[ARGS]{}", "<function=f>", "</function>", "<parameter=x>", "</parameter>", "<arg_key>k</arg_key>", "<arg_value>",
     "</arg_value>", "f(x=1)]", "<|python_tag|>"]
)  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(st.lists(PIECES, max_size=8).map("".join), st.lists(st.integers(0, 400), max_size=8))
def test_a_stream_gives_the_same_however_it_is_cut(text: str, cuts: list[int]) -> None:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    stream = ToolCallStream()
    parts: list[str | ToolCall] = []
    for start, stop in pairwise(places):
        parts += stream.push(text[start:stop])
    parts += stream.flush()
    content, found, invalid = calls(text)
    assert "".join(part for part in parts if isinstance(part, str)) == content
    assert [(part.name, part.arguments) for part in parts if isinstance(part, ToolCall)] == found
    assert stream.invalid == invalid
    assert all(part for part in parts)


def test_text_streams_as_it_comes() -> None:
    stream = ToolCallStream()
    assert stream.push("Hello") == ["Hello"]
    assert stream.push(" world <to") == [" world"]
    assert stream.push("p>") == [" <top>"]
    assert stream.push("<tool_call>") == []
    (call,) = stream.push(F + "</tool_call>")
    assert isinstance(call, ToolCall)
    assert len(call.id) == 9
    assert call.id.isalnum()
    assert stream.push(" ") == stream.flush() == []
