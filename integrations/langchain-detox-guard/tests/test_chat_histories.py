"""ChatDetoxiGen: variables of the template, the window, and other providers' histories."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import pytest
from detox_guard import DetoxiGen, InvalidParamsError, PromptError
from langchain_core.messages import (
    AIMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    ToolMessage,
)

from langchain_detox_guard import ChatDetoxiGen
from langchain_scripts import WINDOW, add

if TYPE_CHECKING:
    from detox_guard.testing import ScriptedDetoxiGen

# -- templates, windows and other providers' histories


def test_variables_of_the_template(detoxigen: ScriptedDetoxiGen) -> None:
    chat = ChatDetoxiGen(detoxigen=detoxigen, seed=1, chat_template_kwargs={"thinking": False})
    for model, seen in (
        (chat, {"thinking": False}),
        (chat.bind(chat_template_kwargs={"thinking": True}), {"thinking": True}),
        (chat.bind(chat_template_kwargs=None).bind_tools([add]), {}),
    ):
        model.invoke("Hi")
        assert detoxigen.calls[-1][1].chat_template_kwargs == seen
    chat.invoke("Hi", chat_template_kwargs={"other": 1})
    assert detoxigen.calls[-1][1].chat_template_kwargs == {"other": 1}
    with pytest.raises(InvalidParamsError, match="chat_template_kwargs"):
        ChatDetoxiGen(chat_template_kwargs="off")  # type: ignore[arg-type]


def test_the_window_is_in_the_profile_and_loads_nothing_before_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, detoxigen: ScriptedDetoxiGen
) -> None:
    asked: list[Any] = []

    def shared(model: Any, **_: Any) -> ScriptedDetoxiGen:
        asked.append(model)
        return detoxigen

    monkeypatch.setattr(DetoxiGen, "shared", shared)
    chat = ChatDetoxiGen(model="some/model", max_tokens=7)
    assert chat.profile is not None
    assert (chat.profile["tool_calling"], chat.profile["max_output_tokens"], asked) == (True, 7, [])
    other = chat.model_copy(update={"model": "other/model"})
    assert other.profile is not None
    assert "max_input_tokens" in other.profile
    assert other.profile["max_input_tokens"] == other.profile.get("max_input_tokens") == WINDOW
    assert asked == ["other/model"]
    assert pickle.loads(pickle.dumps(chat)).profile.get("max_input_tokens") == WINDOW
    own = ChatDetoxiGen(model="some/model", profile={"max_input_tokens": 9}).model_copy(update={"alpha": 1.0})
    assert own.profile == {"max_input_tokens": 9}


CALLED = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
USED = {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}}


@pytest.mark.parametrize(
    ("history", "read"),
    [
        ([{"role": "developer", "content": "Be kind."}, ("user", "Hi")], [("system", "Be kind."), ("user", "Hi")]),
        ([ChatMessage("Be kind.", role="developer"), ChatMessage("Hi", role="human")],
         [("system", "Be kind."), ("user", "Hi")]),
        ([("user", "Hi"), {"role": "assistant", "content": None, "tool_calls": [
            {**CALLED, "function": {"name": "f", "arguments": '{"a": 1}'}}]},
          {"role": "tool", "tool_call_id": "c1", "content": None}],
         [("user", "Hi"), ("assistant", "", "c1"), ("tool", "", "c1")]),
        ([HumanMessage("Hi"), AIMessage("", additional_kwargs={
            "function_call": {"name": "f", "arguments": '{"a": 1}'}}),
          FunctionMessage("Yes.", name="f")],
         [("user", "Hi"), ("assistant", "", "call00000"), ("tool", "Yes.", "call00000")]),
        ([HumanMessage("Hi"), AIMessage([USED]), HumanMessage([
            {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "Yes."}]},
            {"type": "text", "text": "And?"}])],
         [("user", "Hi"), ("assistant", "", "c1"), ("tool", "Yes.", "c1"), ("user", "And?")]),
        ([HumanMessage("Hi"), AIMessage("", tool_calls=[{"name": "f", "args": {"a": 1}, "id": None}]),
          ToolMessage([{"type": "json", "json": {"b": 2}}], tool_call_id="")],
         [("user", "Hi"), ("assistant", "", "call00000"), ("tool", '{"b": 2}', "call00000")]),
        ([HumanMessage([{"type": "input_text", "text": "Hi"}]), AIMessage([{"type": "output_text", "text": "So."}])],
         [("user", "Hi"), ("assistant", "So.")]),
        ([HumanMessage("Hi"), AIMessage([{"type": "text", "text": None}]), HumanMessage("And?")],
         [("user", "Hi"), ("assistant", ""), ("user", "And?")]),
        ([HumanMessage("Hi"), AIMessage("Half", invalid_tool_calls=[
            {"name": "f", "args": "{", "id": None, "error": None}]), HumanMessage("And?")],
         [("user", "Hi"), ("assistant", "Half"), ("user", "And?")]),
    ],
)  # fmt: skip
def test_histories_of_others(chat: ChatDetoxiGen, detoxigen: ScriptedDetoxiGen, history: Any, read: Any) -> None:
    chat.invoke(history)
    said = detoxigen.calls[-1][1].messages
    assert [
        (one["role"], one["content"], *(call["id"] for call in one.get("tool_calls", ())),
         *([one["tool_call_id"]] if one["role"] == "tool" else []))
        for one in said
    ] == read  # fmt: skip
    for call in (call for one in said for call in one.get("tool_calls", ())):
        assert call["function"] == {"name": "f", "arguments": {"a": 1}}


def test_an_unreadable_call_that_was_answered_stays_a_turn(chat: ChatDetoxiGen, detoxigen: ScriptedDetoxiGen) -> None:
    broken = AIMessage("", invalid_tool_calls=[{"name": "f", "args": "{", "id": "c1", "error": None}])
    chat.invoke([HumanMessage("Hi"), broken, ToolMessage("Not done.", tool_call_id="c1")])
    assert [one["role"] for one in detoxigen.calls[-1][1].messages] == ["user", "assistant", "tool"]
    assert detoxigen.calls[-1][1].messages[1]["tool_calls"][0]["id"] == "c1"


@pytest.mark.parametrize("content", [[{"type": "image_url", "image_url": "x"}], [{"type": "audio"}]])
def test_what_is_no_text_is_named(chat: ChatDetoxiGen, content: Any) -> None:
    with pytest.raises(PromptError, match=r"messages\[0\].content"):
        chat.invoke([HumanMessage(content)])
