"""What `DetoxiGenLLM` makes of messages, prompts and variables of the template."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from llama_index.core.base.llms.types import ImageBlock, MessageRole, ToolCallBlock
from llama_index.core.llms import ChatMessage
from llama_index.llms.detox_guard import DetoxiGenLLM
from llama_index_harness import scripted
from ways import HELLO, WAYS, ask

from detox_guard import InvalidParamsError, PromptError

# -- prompts


def test_runs_of_one_role_become_one_message() -> None:
    """An LLM's `system_prompt` before a template's own, for one: the templates of Mistral and Gemma want turns."""
    model = scripted()
    call = ToolCallBlock(tool_call_id="c1", tool_name="w")
    DetoxiGenLLM(detoxigen=model).chat(
        [
            *(ChatMessage(role=MessageRole.SYSTEM, content=content) for content in ("Be kind.", "Be brief.")),
            *(ChatMessage(content) for content in ("One.", "", "Two.")),
            ChatMessage(role=MessageRole.ASSISTANT, content="So:"),
            ChatMessage(role=MessageRole.ASSISTANT, content=[call]),
            *(ChatMessage(role=MessageRole.TOOL, content="3", additional_kwargs={"tool_call_id": "c1"}),) * 2,
        ]
    )
    assert [(one["role"], one["content"]) for one in model.calls[-1].prompt.messages] == [
        ("system", "Be kind.\nBe brief."), ("user", "One.\nTwo."), ("assistant", "So:"), ("assistant", ""),
        ("tool", "3"), ("tool", "3"),
    ]  # fmt: skip


async def test_messages_reach_the_template_with_their_roles() -> None:
    model = scripted()
    DetoxiGenLLM(detoxigen=model).chat(
        [
            ChatMessage(role=MessageRole.DEVELOPER, content="Be kind."),
            ChatMessage("Weather?"),
            ChatMessage(role=MessageRole.ASSISTANT, content=[ToolCallBlock(tool_call_id="c1", tool_name="w")]),
            ChatMessage(role=MessageRole.TOOL, content="sunny", additional_kwargs={"tool_call_id": "c1"}),
            ChatMessage(role=MessageRole.CHATBOT, content="Sunny."),
        ]
    )
    messages = model.calls[0].prompt.messages
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "tool", "assistant"]
    call = {"id": "c1", "type": "function", "function": {"name": "w", "arguments": {}}}
    assert messages[2]["tool_calls"] == [call]
    assert (messages[2]["content"], messages[3]["name"], messages[3]["tool_call_id"]) == ("", "w", "c1")


@pytest.mark.parametrize(
    "kept",
    [
        {"id": "c1", "type": "function", "function": {"name": "w", "arguments": '{"day": "Monday"}'}},
        SimpleNamespace(id="c1", function=SimpleNamespace(name="w", arguments='{"day": "Monday"}')),
        {"type": "tool_use", "id": "c1", "name": "w", "input": {"day": "Monday"}},
        {"name": "w", "args": {"day": "Monday"}, "id": "c1", "type": "tool_call"},
        {"tool_id": "c1", "tool_name": "w", "tool_kwargs": {"day": "Monday"}},
        ToolCallBlock(tool_call_id="c1", tool_name="w", tool_kwargs={"day": "Monday"}).model_dump(),
    ],
)
def test_calls_that_other_llms_keep_beside_their_message_are_read(kept: Any) -> None:
    model = scripted()
    history = [
        ChatMessage("Weather?"),
        ChatMessage(role="assistant", content=None, additional_kwargs={"tool_calls": [kept]}),
        ChatMessage(role="tool", content="sunny", additional_kwargs={"tool_call_id": "c1"}),
    ]
    DetoxiGenLLM(detoxigen=model).chat(history)
    messages = model.calls[0].prompt.messages
    call = {"id": "c1", "type": "function", "function": {"name": "w", "arguments": {"day": "Monday"}}}
    assert messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert (messages[2]["name"], messages[2]["tool_call_id"]) == ("w", "c1")


@pytest.mark.parametrize(
    ("written", "read"),
    [("", {}), ("null", {}), ("[1]", {"arguments": [1]}), ("half {", {"arguments": "half {"}), ({}, {})],
)
def test_arguments_as_text_are_read(written: Any, read: Any) -> None:
    model = scripted()
    block = ToolCallBlock(tool_call_id=None, tool_name="w", tool_kwargs=written)
    DetoxiGenLLM(detoxigen=model).chat([ChatMessage("Weather?"), ChatMessage(role="assistant", content=[block])])
    (call,) = model.calls[0].prompt.messages[1]["tool_calls"]
    assert (call["id"], call["function"]["arguments"]) == ("", read)


def test_variables_of_the_template_come_with_the_messages() -> None:
    model = scripted()
    llm = DetoxiGenLLM(detoxigen=model, chat_template_kwargs={"enable_thinking": False, "a": 1})
    llm.chat(HELLO)
    llm.chat(HELLO, chat_template_kwargs={"a": 2})
    DetoxiGenLLM(detoxigen=model).chat(HELLO)
    given = [dict(prompt.chat_template_kwargs) for _, prompt, _ in model.calls]
    assert given == [{"enable_thinking": False, "a": 1}, {"enable_thinking": False, "a": 2}, {}]
    llm.complete("A plain text goes through no template.")


@pytest.mark.parametrize("bad", [5, "thinking", ["a"], {1: 2}])
def test_bad_variables_are_named(bad: Any) -> None:
    for way in (
        lambda: DetoxiGenLLM(chat_template_kwargs=bad),
        lambda: DetoxiGenLLM(detoxigen=scripted()).chat(HELLO, chat_template_kwargs=bad),
        lambda: DetoxiGenLLM(detoxigen=scripted()).complete("a", chat_template_kwargs=bad),
    ):
        with pytest.raises(InvalidParamsError, match="chat_template_kwargs"):
            way()
    with pytest.raises(InvalidParamsError, match="chat_template_kwargs"):
        DetoxiGenLLM(detoxigen=scripted()).complete("a", chat_template_kwargs={"a": 1})
    with pytest.raises(PromptError, match="chat_template_kwargs"):
        DetoxiGenLLM(detoxigen=scripted(chat=False), chat_template_kwargs={"a": 1}).chat(HELLO)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "bad",
    [{"temperature": "0.5"}, {"temperature": None}, {"guard": "strict"}, {"guard": {"threshold": 3.0}}, {"stop": 5},
     {"grammar": {"kind": "verse", "body": "x"}}, {"seed": -1}, {"tools": 5}, {"tools": ["x"]}, {"tool_choice": 5},
     {"allow_parallel_tool_calls": "no"}],
)  # fmt: skip
async def test_a_bad_value_in_a_call_is_named(way: str, bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidParamsError) as caught:
        await ask(DetoxiGenLLM(detoxigen=scripted()), way, **bad)
    assert next(iter(bad)) in caught.value.field


def test_a_block_it_cannot_read_is_refused() -> None:
    message = ChatMessage(content=[ImageBlock(url="https://example.org/cat.png")])
    with pytest.raises(PromptError, match=r"messages\[0\].*ImageBlock"):
        DetoxiGenLLM(detoxigen=scripted()).chat([message])


def test_without_a_template_messages_become_a_plain_prompt() -> None:
    model = scripted(chat=False, tools=False)
    DetoxiGenLLM(detoxigen=model).chat(HELLO)
    assert model.calls[0].prompt == "user: When does the library open?\nassistant: "


def test_completion_prompts_are_formatted_once() -> None:
    model = scripted()
    llm = DetoxiGenLLM(detoxigen=model, completion_to_prompt=lambda text: f"<{text}>")
    llm.complete("a")
    llm.complete("b", formatted=True)
    assert [prompt for _, prompt, _ in model.calls] == ["<a>", "b"]


@pytest.mark.parametrize(
    ("system", "kwargs", "stop"),
    [
        ("Thought: …\nObservation: tool response", {}, ("Observation:",)),
        ("Thought: …\nObservation: tool response", {"stop": ["END"]}, ("END",)),
        ("Be kind.", {}, ()),
    ],
)
def test_only_react_prompts_stop_at_an_observation(system: str, kwargs: dict[str, Any], stop: tuple[str, ...]) -> None:
    model = scripted()
    DetoxiGenLLM(detoxigen=model).chat([ChatMessage(role="system", content=system), *HELLO], **kwargs)
    assert model.calls[0].params.stop == stop
