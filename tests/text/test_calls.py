"""Tool calls as models of every family write them, and prose that only speaks of them."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from detox_guard import ToolCall, ToolCallStream, parse_tool_calls


def read(text: str, tools: Any = ()) -> tuple[str, list[tuple[str, dict[str, Any]]], list[str]]:
    """As `parse_tool_calls`; and read letter by letter it is the same."""
    content, calls, invalid = parse_tool_calls(text, tools)
    stream = ToolCallStream(tools)
    parts = [part for letter in text for part in stream.push(letter)] + stream.flush()
    assert "".join(part for part in parts if isinstance(part, str)) == content
    found = [(call.name, call.arguments) for call in calls]
    assert [(part.name, part.arguments) for part in parts if isinstance(part, ToolCall)] == found
    assert stream.invalid == invalid
    return content, found, invalid


X1 = ("f", {"x": 1})
FORMS: dict[str, tuple[str, list[tuple[str, dict[str, Any]]]]] = {
    "Llama, one": ('{"name": "f", "parameters": {"x": 1}}', [X1]),
    "Llama, semicolons": ('{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {}}', [X1, ("g", {})]),
    "Llama, lines": ('{"name": "f", "parameters": {"x": 1}}\n{"name": "g", "parameters": {}}', [X1, ("g", {})]),
    "type first": ('{"type": "function", "name": "f", "parameters": {"x": 1}}', [X1]),
    "OpenAI": ('{"type": "function", "function": {"name": "f", "arguments": "{\\"x\\": 1}"}}', [X1]),
    "arguments first": ('[{"arguments": {"x": 1}, "name": "f"}]', [X1]),
    "python tag": ('<|python_tag|>{"name": "f", "parameters": {"x": 1}}', [X1]),
    "built-in tool": ('<|python_tag|>search.call(query="a; b")', [("search", {"query": "a; b"})]),
    "pythonic": ("[f(x=1), g()]", [X1, ("g", {})]),
    "pythonic, values": (
        """[f(a="it's", b=['c', {"d": null}], e=-1.5, g=true, h=None, i=metric)]""",
        [("f", {"a": "it's", "b": ["c", {"d": None}], "e": -1.5, "g": True, "h": None, "i": "metric"})],
    ),
    "pythonic, escapes": (r'[f(a="\d+\n")]', [("f", {"a": "\\d+\n"})]),
    "pythonic, tags": ("<|python_start|>[f(x=1)]<|python_end|>", [X1]),
    "dotted": ("[user.files.read(x=1)]", [("user.files.read", {"x": 1})]),
    "Hermes": ('<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', [X1]),
    "Hermes, two in one": (
        '<tool_call>{"name": "f", "arguments": {"x": 1}}\n{"name": "g"}</tool_call>', [X1, ("g", {})],
    ),
    "Hermes, not closed": ('<tool_call>{"name": "f", "arguments": {"x": 1}}<tool_call>{"name": "g"}', [X1, ("g", {})]),
    "line breaks": ('<tool_call>{"name": "f", "arguments": {"s": "a\nb\tc"}}</tool_call>', [("f", {"s": "a\nb\tc"})]),
    "a tag in a string": (
        '<tool_call>{"name": "f", "arguments": {"s": "\\"</tool_call><tool_call>"}}</tool_call>',
        [("f", {"s": '"</tool_call><tool_call>'})],
    ),
    "half a character": (
        '<tool_call>{"name": "f", "arguments": {"s": "\\ud83d"}}</tool_call>', [("f", {"s": "\ufffd"})],
    ),
    "Qwen3-Coder": (
        "<tool_call>\n<function=f>\n<parameter=a>\nOslo\n</parameter>\n<parameter=b>\n[1, 2]\n</parameter>\n"
        "<parameter=c>\nline\n\n  line\n</parameter>\n</function>\n</tool_call>",
        [("f", {"a": "Oslo", "b": [1, 2], "c": "line\n\n  line"})],
    ),
    "Qwen3-Coder, bare": ("<function=f>\n<parameter=a>\nb\n</parameter>\n</function>", [("f", {"a": "b"})]),
    "Qwen3-Coder, no end of a value": (
        "<tool_call><function=f><parameter=a>1<parameter=b>c</function></tool_call>",
        [("f", {"a": "1", "b": "c"})],
    ),
    "Qwen3-Coder, nothing": ("<tool_call>\n<function=now>\n</function>\n</tool_call>", [("now", {})]),
    "Qwen3-Coder, a tag in a value": (
        '<tool_call><function=f><parameter=a>"</tool_call>" \'</parameter></function></tool_call>',
        [("f", {"a": "\"</tool_call>\" '"})],
    ),
    "Llama, function tag": ('<function=f>{"x": 1}</function>', [X1]),
    "GLM": (
        "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>Oslo</arg_value>\n<arg_key>b</arg_key>\n"
        '<arg_value>{"c": 1}</arg_value>\n</tool_call>',
        [("f", {"a": "Oslo", "b": {"c": 1}})],
    ),
    "GLM, nothing": ("<tool_call>now\n</tool_call>\n<tool_call>then</tool_call>", [("now", {}), ("then", {})]),
    "Mistral": ('[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}, "id": "123456789"}]', [X1]),
    "Mistral, newer": ('[TOOL_CALLS]f[ARGS]{"x": 1}', [X1]),
    "Mistral, several": ('[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g[ARGS]{}', [X1, ("g", {})]),
    "Mistral, with ids": ('[TOOL_CALLS]f[CALL_ID]a1B2c3D4e[ARGS]{"x": 1}', [X1]),
    "Mistral, a mark in a string": ('[TOOL_CALLS]f[ARGS]{"s": "[TOOL_CALLS]"}', [("f", {"s": "[TOOL_CALLS]"})]),
    "DeepSeek": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{\"x\": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        [X1],
    ),
    "DeepSeek, fenced": (
        "<｜tool▁calls▁begin｜>"
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{\"x\": 1}\n```<｜tool▁call▁end｜>\n"
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        [X1, ("g", {})],
    ),
    "Kimi": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{\"x\": 1}"
        "<|tool_call_end|><|tool_calls_section_end|>",
        [X1],
    ),
    "Gemma": ('<|tool_call>call:f{x:1,s:<|"|>a: {b}<|"|>}<tool_call|>', [("f", {"x": 1, "s": "a: {b}"})]),
    "Phi": ('<|tool_call|>[{"name": "f", "arguments": {"x": 1}}]<|/tool_call|>', [X1]),
    "Command": (
        '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "f", "parameters": {"x": 1}}]<|END_ACTION|>', [X1],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "calls"), FORMS.values(), ids=FORMS)
def test_calls_of_every_family_are_read(text: str, calls: Any) -> None:
    assert read(text) == ("", calls, [])
    assert read(f"\n {text}\n") == ("", calls, [])


TAGGED = {name: form for name, form in FORMS.items() if form[0][0] == "<" or form[0].startswith("[TOOL_CALLS]")}


@pytest.mark.parametrize(("text", "calls"), TAGGED.values(), ids=TAGGED)
def test_content_before_a_call_is_content(text: str, calls: Any) -> None:
    if calls[0][0] != "now":  # which has but its name, on a line of its own
        assert read(f"Let me see. {text}") == ("Let me see.", calls, [])
    assert read(f"Let me see.\n{text}") == ("Let me see.", calls, [])


@pytest.mark.parametrize(
    "written", ["null", '""', '" "', "{}", '"{}"']
)  # fmt: skip
@pytest.mark.parametrize("key", ["arguments", "parameters"])
def test_a_tool_without_parameters_can_be_called(key: str, written: str) -> None:
    call = f'{{"name": "now", "{key}": {written}}}'
    for text in (f"<tool_call>\n{call}\n</tool_call>", call, f"[{call}]", f"[TOOL_CALLS] [{call}]"):
        assert read(text) == ("", [("now", {})], [])
    assert read('<tool_call>{"name": "now"}</tool_call>') == ("", [("now", {})], [])
    assert read('<tool_call>{"name": "now", "id": "1", "type": "function"}</tool_call>') == ("", [("now", {})], [])


@pytest.mark.parametrize(
    "text",
    [
        "To call a tool, such models write `<tool_call>` and then JSON. Then they go on.",
        "To call a tool, such models write <tool_call> and then JSON. Then they go on.",
        "Calls stand between <tool_call> and </tool_call>.",
        "Calls stand between <tool_call></tool_call> tags.",
        "Calls stand between <tool_call>...</tool_call> tags.",
        "It ends with <tool_call>",
        "It ends with `<tool_call>`",
        "<tool_call> is a tag, and so is <function=name>.",
        '`<tool_call>{"name": "f", "arguments": {}}</tool_call>` is a call.',
        "Mistral writes [TOOL_CALLS] and [ARGS]; Llama writes <|python_tag|> or <|python_start|> first.",
        "[TOOL_CALLS] is a token of Mistral's.",
        "Qwen3-Coder writes <function=name> and <parameter=name>, GLM writes <arg_key>.",
        "The tags <｜tool▁calls▁begin｜> and <|tool_call|> are of other models.",
        "<tool_call> { not JSON } goes on",
        "[f(x=1)] is how Llama does it",
        "[link](https://example.org), [1], [f(1)]",
        "[f(1)]",
        "[f(**x)]",
        "[]",
        "[1, 2]",
        '[{"name": "Ann"}]',
        '{"name": "Ann"}',
        '{"name": "Ann", "parameters": 3}',
        '{"type": "function"}',
        'For example: {"name": "f", "parameters": {}}',
        "<tool",
        "a < b <= c [d] </tool_call>",
    ],
)
def test_prose_that_names_a_tag_is_prose(text: str) -> None:
    assert read(text) == (text, [], [])
    assert read(f"{text}\nYes.") == (f"{text}\nYes.", [], [])


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "not JSON"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "x": 1}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": ' + "[" * 200 + "]" * 200 + "}}</tool_call>",
        '<tool_call>{"name": "f", "argu',
        "<tool_call><function=f><parameter=x>1",
        "<tool_call>f\n<arg_key>a</arg_key>\n</tool_call>",
        '[TOOL_CALLS]f[ARGS]{"x": ',
        '[TOOL_CALLS]f[ARGS]{"x": 1} and so on',
        '<|tool_call>call:f{x:<|"|>a}<tool_call|>',
        '<|START_ACTION|>[{"tool_name": 3}]<|END_ACTION|>',
    ],
)
def test_a_call_that_cannot_be_read_is_kept_whole(text: str) -> None:
    content, calls, invalid = read(text)
    if calls:  # cut off behind its last value: whole all the same
        assert text.startswith("<tool_call><function=f>")
    else:
        assert (content, invalid) == ("", [text])


def test_content_on_the_two_sides_of_a_call_is_never_joined_into_a_word() -> None:
    block = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
    assert read(f"an id{block}iot") == ("an id\niot", [X1], [])
    assert read(f"an id {block}{block} iot") == ("an id iot", [X1, X1], [])
    assert read(f"an id<tool_call>{{}}</tool_call>iot") == ("an id\niot", [], ["<tool_call>{}</tool_call>"])  # noqa: F541
    assert read(f"{block}Done.") == ("Done.", [X1], [])


def test_what_is_written_without_quotes_has_the_type_of_its_schema() -> None:
    kinds = {
        "a": {"type": "integer"}, "b": {"type": "string"}, "c": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
        "d": {"type": ["string", "null"]}, "e": {"enum": ["1", "2"]}, "f": {"type": "array"}, "g": {},
    }  # fmt: skip
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": kinds}}}
    written = {"a": "3", "b": "3", "c": "True", "d": "null", "e": "1", "f": "[1]", "g": "3"}
    wanted = {"a": 3, "b": "3", "c": True, "d": None, "e": "1", "f": [1], "g": "3"}
    values = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in written.items())
    assert read(f"<tool_call><function=f>{values}</function></tool_call>", [tool])[1] == [("f", wanted)]
    values = "".join(f"<arg_key>{key}</arg_key><arg_value>{value}</arg_value>" for key, value in written.items())
    assert read(f"<tool_call>f{values}</tool_call>", [tool])[1] == [("f", wanted)]
    assert read("<tool_call><function=f><parameter=a>many</parameter></function></tool_call>", [tool])[1] == [
        ("f", {"a": "many"})
    ]


LOOPS = [
    ('<tool_call>{"a": "', "</tool_call>"),
    ("", "<tool_call>"),
    ("", "<tool_call> and "),
    ("<tool_call>", " \n"),
    ("", "`<tool_call>"),
    ("", '<tool_call>{"name": "f"}</tool_call>x'),
    ("", "<tool_call><function=f><parameter=a>"),
    ("<function=f>", "<parameter=a>"),
    ("<tool_call>f<arg_key>a", "</arg_key><arg_value>"),
    ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f", "<｜tool▁sep｜>"),
    ("[TOOL_CALLS]", "f[ARGS]{"),
    ("[", "f(x=["),
    ("<|python_tag|>", "-"),
    ("", '{"name": '),
    ('{"name": "f", "parameters": {', "\\"),
    ("", "<"),
]


@pytest.mark.parametrize(("start", "loop"), LOOPS, ids=[f"{start}{loop}"[:20] for start, loop in LOOPS])
def test_a_looping_reply_is_read_in_time_that_grows_with_its_length(start: str, loop: str) -> None:
    text = start + loop * (200_000 // len(loop))
    began = time.process_time()
    whole = parse_tool_calls(text)
    stream = ToolCallStream()
    for at in range(0, len(text), 20):
        stream.push(text[at : at + 20])
    stream.flush()
    # A quarter of a second; in squares of the length it would be minutes.
    assert time.process_time() - began < 20
    assert len(whole[0]) + sum(map(len, whole[2])) <= len(text)


def test_calls_are_plain_json_whatever_was_written() -> None:
    for text, _ in FORMS.values():
        for _, arguments in read(text)[1]:
            assert json.loads(json.dumps(arguments, allow_nan=False)) == arguments
            json.dumps(arguments, ensure_ascii=False).encode()


def test_a_call_as_a_provider_writes_it_is_read() -> None:
    """With an id in front, and its arguments as JSON text."""
    written = {"id": "call_1", "type": "function", "function": {"name": "say", "arguments": '{"text": "hi"}'}}
    for text in (json.dumps(written), json.dumps([written])):
        content, calls, invalid = parse_tool_calls(text)
        assert (content, [(call.name, call.arguments) for call in calls], invalid) == (
            "",
            [("say", {"text": "hi"})],
            [],
        )


def test_an_answer_in_json_is_no_call_of_a_tool_that_is_not_there() -> None:
    tool = {"type": "function", "function": {"name": "say", "parameters": {"type": "object", "properties": {}}}}
    answer = '{"name": "Anna", "parameters": {"age": 5}}'
    assert parse_tool_calls(answer, [tool]) == (answer, [], [])
    assert [call.name for call in parse_tool_calls(answer.replace("Anna", "say"), [tool])[1]] == ["say"]
    assert [call.name for call in parse_tool_calls(answer)[1]] == ["Anna"]
