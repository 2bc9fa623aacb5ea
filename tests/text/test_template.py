"""Histories through chat templates of every shape: nothing that is said is lost."""

from __future__ import annotations

import json
from typing import Any

import pytest
from templates import ALL, DEAF, GEMMA, LLAMA, NINE, SINGLE, TOOL, TOOLS, backbone, call, message, said
from tiny import CHATML

from detox_guard import ChatPrompt, DetoxiGen, InvalidParamsError, PromptError
from detox_guard.text.prompts import encode_prompt

ALL |= {"one call": SINGLE, "nine letters": NINE}


# --- layouts


LEGAL = {
    "one": [message("user", "amber")],
    "system": [message("system", "amber"), message("user", "birch")],
    "only a system": [message("system", "amber")],
    "two systems": [message("system", "amber"), message("system", "birch"), message("user", "cedar")],
    "a late system": [message("user", "amber"), message("assistant", "birch"), message("system", "cedar")],
    "users in a row": [message("user", "amber"), message("user", "birch"), message("assistant", "cedar")],
    "assistant first": [message("assistant", "amber"), message("user", "birch")],
    "assistant last": [message("user", "amber"), message("assistant", "birch")],
    "assistants in a row": [message("user", "amber"), message("assistant", "birch"), message("assistant", "cedar")],
    "tools": [
        message("system", "amber"),
        message("user", "birch"),
        message("assistant", "cedar", tool_calls=[call("dune", {"a": "elder"}, "1"), call("fern", {"b": 7}, "2")]),
        message("tool", "hazel", tool_call_id="1"),
        message("tool", "iris", tool_call_id="2"),
        message("user", "jasmine"),
    ],
    "calls without content": [
        message("user", "amber"),
        message("assistant", None, tool_calls=[call("birch", '{"a": "cedar"}', "1")]),
        message("tool", "dune", tool_call_id="1"),
    ],
}  # fmt: skip
WORDS = ("amber", "birch", "cedar", "dune", "elder", "fern", "hazel", "iris", "jasmine")


@pytest.mark.parametrize("template", ALL.values(), ids=ALL)
@pytest.mark.parametrize("history", LEGAL.values(), ids=LEGAL)
def test_every_template_takes_every_legal_history_and_nothing_is_lost(template: str, history: Any) -> None:
    text = said(template, history)
    assert [word for word in WORDS if word in json.dumps(history)] == [word for word in WORDS if word in text]
    contents = [one["content"] for one in history if one["content"]]
    assert [text.count(content) for content in contents] == [1] * len(contents)


def test_the_order_is_kept_where_a_template_has_system_at_its_end() -> None:
    for template in (CHATML, LLAMA, GEMMA, DEAF, TOOLS):
        text = said(template, LEGAL["tools"])
        places = [text.index(word) for word in ("birch", "cedar", "hazel", "iris", "jasmine")]
        assert places == sorted(places)


@pytest.mark.parametrize("template", ALL.values(), ids=ALL)
def test_tools_are_told_whatever_the_template(template: str) -> None:
    assert said(template, ChatPrompt([message("user", "Hi")], [TOOL])).count('"weather"') == 1


def test_a_template_that_keeps_only_the_last_message_is_refused_by_name() -> None:
    with pytest.raises(PromptError, match="leaves it out") as caught:
        said("{{ messages[-1].content }}", [message("user", "a"), message("assistant", "b"), message("user", "c")])
    assert caught.value.field == "messages[0]"
    assert said("{{ messages[-1].content }}", [message("user", "c")]) == "c"


@pytest.mark.parametrize("content", ["  spaced \n", "UPPER lower", "a <think>b</think> c"])
def test_templates_that_change_what_is_said_have_heard_it(content: str) -> None:
    changed = "{% for m in messages %}{{ m.content.split('</think>')[-1] | trim | upper }}{% endfor %}"
    assert said(changed, [message("user", content)]) == content.split("</think>")[-1].strip().upper()


@pytest.mark.parametrize("broken", ["{{ 1 / 0 }}", "{{ messages[7].content.x }}", "{{ messages.x.y }}", "{% for %}"])
def test_templates_that_break_are_a_prompt_error(broken: str) -> None:
    with pytest.raises(PromptError, match="refuses them"):
        said(broken, [message("user", "Hi")])


# --- as others write them


def test_other_names_of_roles_and_contents_in_parts() -> None:
    parts = [{"type": "text", "text": "two"}, "three", {"type": "input_text", "text": "four"}]
    told = [message("developer", "one"), message("human", parts), message("ai", None), message("model", "five")]
    plain = [message("system", "one"), message("user", "two\nthree\nfour"), message("assistant")]
    assert said(CHATML, told) == said(CHATML, [*plain, message("assistant", "five")])


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}', ' {"a": 1}\n'])
def test_arguments_are_encoded_once_however_they_come(arguments: Any) -> None:
    history = [message("user", "x"), message("assistant", None, tool_calls=[call("f", arguments, "c1")])]
    assert 'f {"a": 1}</call>' in said(TOOLS, history)
    assert '"arguments": {"a": 1}}' in said(CHATML, history)


@pytest.mark.parametrize("arguments", [None, "", " ", {}, "{}"])
def test_a_call_without_arguments_is_one(arguments: Any) -> None:
    history = [message("user", "x"), message("assistant", None, tool_calls=[call("now", arguments, "c1")])]
    assert "now {}</call>" in said(TOOLS, history)
    del history[1]["tool_calls"][0]["function"]["arguments"]
    assert "now {}</call>" in said(TOOLS, history)


@pytest.mark.parametrize(
    "ids", [("call_8fKq2LxWzR1", "toolu_01"), ("a1", "a2"), ("", ""), (None, None), ("chatcmpl-tool-é", 17)]
)
def test_ids_of_any_form_fit_and_name_the_same_call(ids: tuple[Any, Any]) -> None:
    calls = [call("f", {}, ids[0]), call("g", {}, ids[1])]
    results = [message("tool", "2", tool_call_id=ids[1], name="g"), message("tool", "1", tool_call_id=ids[0])]
    text = said(NINE, [message("user", "x"), message("assistant", None, tool_calls=calls), *results])
    first, second = (text.split(f">{name} {{}}")[0].rpartition(" ")[2] for name in "fg")
    assert first != second
    assert len(first) == len(second) == 9
    assert f"<result {second}>g: 2</result>" in text
    assert f"<result {first}>f: 1</result>" in text


def test_ids_stay_where_the_template_takes_them() -> None:
    history = [message("user", "x"), message("assistant", "", tool_calls=[call("f", {}, "functions.f:0")])]
    assert "<call functions.f:0>" in said(TOOLS, history)


def test_the_older_form_of_a_call_and_the_flat_one() -> None:
    result = message("function", "3", name="f")
    older = message("assistant", None, function_call={"name": "f", "arguments": '{"a": 1}'})
    flat = message("assistant", "", tool_calls=[{"id": "c1", "name": "f", "args": {"a": 1}}])
    for history in ([message("user", "x"), older, result], [message("user", "x"), flat, result]):
        text = said(TOOLS, history)
        assert 'f {"a": 1}</call>' in text
        assert ">f: 3</result>" in text


def test_half_a_character_that_a_model_or_a_tool_wrote_does_not_end_the_thread() -> None:
    calls = [call("f", {"a\udc00": "b\ud83d"}, "c1")]
    history = [message("user", "x"), message("assistant", "so \ud83d", tool_calls=calls), message("tool", "\udfff!")]
    text = said(CHATML, history)
    assert "so \ufffd" in text
    assert '{"a\ufffd": "b\ufffd"}' in text
    assert "\ufffd!" in text


def deep(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


def test_what_nests_too_deep_or_in_itself_is_refused_by_name() -> None:
    endless: dict[str, Any] = {}
    endless |= {"a": endless, "b": [endless, endless]}
    made = backbone(TOOLS)
    for arguments in (deep(5000), endless, json.dumps(deep(300)), "[" * 100_000, {1: 2}, {"a": b"x"}):
        with pytest.raises(PromptError) as caught:
            encode_prompt(made, [message("assistant", "", tool_calls=[call("f", arguments)])])
        assert caught.value.field == "messages[0].tool_calls[0].function.arguments"
    for schema in (deep(5000), endless):
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": schema}}}
        with pytest.raises(InvalidParamsError) as refused:
            encode_prompt(made, ChatPrompt([message("user", "x")], [tool]))
        assert refused.value.field == "tools[0].function"
    assert encode_prompt(made, [message("assistant", "", tool_calls=[call("f", deep(50))])])


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (message("assistant", "", tool_calls="f()"), "messages[0].tool_calls"),
        (message("assistant", "", tool_calls=[{"function": {"name": ""}}]), "messages[0].tool_calls[0]"),
        (message("assistant", "", tool_calls=[call("f", "{a: 1}")]), "messages[0].tool_calls[0].function.arguments"),
        (message("assistant", "", tool_calls=[call("f", 3)]), "messages[0].tool_calls[0].function.arguments"),
        ({"from": "human", "value": "Hi"}, "messages[0].role"),
        (message("tool", {"a": 1}), "messages[0].content"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(bad: Any, field: str) -> None:
    with pytest.raises(PromptError) as caught:
        said(TOOLS, [bad])
    assert caught.value.field == field


# --- the beginning of text, and variables


def test_a_prompt_laid_out_as_text_begins_once() -> None:
    from tokenizers.processors import TemplateProcessing

    made = backbone("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer = made.tokenizer
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A {tokenizer.eos_token}",
        special_tokens=[(tokenizer.bos_token, bos), (tokenizer.eos_token, eos)],
    )
    own = tokenizer("Hi", add_special_tokens=False)["input_ids"]
    assert encode_prompt(made, "Hi") == [bos, *own, eos]
    assert encode_prompt(made, f"{tokenizer.bos_token}Hi") == [bos, *own, eos]
    assert encode_prompt(made, f"{tokenizer.eos_token}Hi") == [bos, eos, *own, eos]
    assert encode_prompt(made, [message("user", "Hi")]) == [bos, *own]


def test_variables_reach_the_template_by_the_prompt_and_by_the_call() -> None:
    made = backbone(CHATML + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}")
    off = {"enable_thinking": False}
    messages = [message("user", "Hi")]
    with DetoxiGen(made) as model:
        plain, thought = (model.count_tokens(ChatPrompt(messages, chat_template_kwargs=one)) for one in ({}, off))
        assert thought > plain
        assert model.count_tokens(messages, chat_template_kwargs=off) == thought
        reply = model.generate(messages, max_new_tokens=1, chat_template_kwargs=off)
        assert reply.usage.prompt_tokens == thought
        on = ChatPrompt(messages, chat_template_kwargs={"enable_thinking": True})
        params = model.params.replace(max_new_tokens=1)
        used = [reply.usage.prompt_tokens for reply in model.batch([messages, on], params, chat_template_kwargs=off)]
        assert used == [thought, thought]
        assert [reply.usage.prompt_tokens for reply in model.batch([messages, on], params)] == [plain, plain]
        with pytest.raises(PromptError) as caught:
            model.generate("Hi", chat_template_kwargs=off)
        assert caught.value.field == "chat_template_kwargs"


THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% set said = m.content %}{% set thought = '' %}"
    "{% if m.role == 'assistant' %}{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
    "{% elif '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if thought and loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{% endif %}"
    "{{ said + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_reply_with_its_thoughts_goes_back_as_the_template_wants_it() -> None:
    made = backbone(THINKS)
    made.tokenizer.add_tokens(["<think>", "</think>"])
    replies = [message("user", "Hi"), message("assistant", "<think>\nWell.\n</think>\n\nYes.")]
    for history in (replies, [*replies, message("user", "So?")]):
        own = made.tokenizer.apply_chat_template(history, add_generation_prompt=True, return_dict=False)
        assert encode_prompt(made, history) == own
    spelt = [message("user", "</think> Hi <think>"), *replies[1:]]
    ids = encode_prompt(made, spelt)
    assert [ids.count(made.tokenizer.convert_tokens_to_ids(tag)) for tag in ("<think>", "</think>")] == [1, 1]
