"""`DetoxiGenLLM` against LlamaIndex's contract, on a scripted model."""

from __future__ import annotations

import asyncio
import json
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from llama_index.core import Settings
from llama_index.core.base.llms.types import ImageBlock, MessageRole, ToolCallBlock
from llama_index.core.callbacks import CallbackManager, CBEventType, TokenCountingHandler
from llama_index.core.indices.prompt_helper import PromptHelper
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.llms.detox_guard import DetoxiGenLLM, detox_options
from llama_index_harness import CLEAN, Callbacks, recorded_events, scripted

from detox_guard import DecodingParams, DetoxiGen, InvalidParamsError, PromptError, StepError
from detox_guard.testing import ScriptedDetoxiGen  # noqa: TC001

HELLO = [ChatMessage("When does the library open?")]
WAYS = ["complete", "stream_complete", "chat", "stream_chat", "acomplete", "astream_complete", "achat", "astream_chat"]


async def ask(llm: DetoxiGenLLM, way: str, **kwargs: Any) -> list[Any]:
    """Every response of one call, whichever of the eight ways it is."""
    result = getattr(llm, way)("When does the library open?" if "complete" in way else HELLO, **kwargs)
    if way.startswith("a"):
        result = await result
    if way.startswith("stream"):
        return list(result)
    if way.startswith("astream"):
        return [response async for response in result]
    return [result]


def text_of(response: Any) -> str:
    return response.text if hasattr(response, "text") else response.message.content


# -- the eight ways


@pytest.mark.parametrize("way", WAYS)
async def test_every_way_gives_the_same_text_and_usage(way: str) -> None:
    engine = scripted()
    responses = await ask(DetoxiGenLLM(detoxigen=engine), way)
    assert text_of(responses[-1]) == CLEAN
    raw = responses[-1].raw
    assert raw["usage"]["completion_tokens"] == len(CLEAN.split())
    assert raw["usage"]["total_tokens"] == raw["usage"]["prompt_tokens"] + raw["usage"]["completion_tokens"]
    assert raw["finish_reason"] == "stop"
    assert raw["model"] == "scripted/words"
    assert len(json.dumps(raw)) < 2000
    assert raw["detox"]["seed"] == 0
    assert len(engine.calls) == 1


@pytest.mark.parametrize("way", [way for way in WAYS if "stream" in way])
async def test_streams_are_cumulative_with_deltas(way: str) -> None:
    responses = await ask(DetoxiGenLLM(detoxigen=scripted()), way)
    so_far = ""
    for response in responses:
        so_far += response.delta
        assert text_of(response) == so_far
    assert len(responses) > 3
    assert [response.raw is not None for response in responses] == [False] * (len(responses) - 1) + [True]


@pytest.mark.parametrize("way", WAYS)
async def test_events_and_callbacks_come_exactly_once(way: str) -> None:
    callbacks = Callbacks()
    llm = DetoxiGenLLM(detoxigen=scripted(), callback_manager=CallbackManager([callbacks]))
    with recorded_events() as events:
        await ask(llm, way)
    kind = "Completion" if "complete" in way else "Chat"
    assert len(events.named(f"LLM{kind}StartEvent")) == len(events.named(f"LLM{kind}EndEvent")) == 1
    other = "Chat" if kind == "Completion" else "Completion"
    assert not events.named(f"LLM{other}StartEvent")
    assert callbacks.started == callbacks.ended == [CBEventType.LLM]


@pytest.mark.parametrize("way", WAYS)
async def test_an_engine_error_surfaces_at_once(way: str) -> None:
    llm = DetoxiGenLLM(detoxigen=scripted([StepError("the numbers are not numbers")]))
    with pytest.raises(StepError, match="not numbers"):
        await ask(llm, way)


@pytest.mark.parametrize("way", WAYS)
async def test_options_of_a_call_win_over_those_of_the_llm(way: str) -> None:
    model = scripted()
    await ask(DetoxiGenLLM(detoxigen=model, alpha=1.5, temperature=0.5), way, alpha=3.0, stop=["It"], seed=5)
    *_, params = model.calls[0]
    assert (params.alpha, params.temperature, params.stop, params.seed) == (3.0, 0.5, ("It",), 5)
    assert params.max_new_tokens == 64  # the model's own default


@pytest.mark.parametrize("way", WAYS)
async def test_an_unknown_option_is_named(way: str) -> None:
    with pytest.raises(InvalidParamsError, match="temprature"):
        await ask(DetoxiGenLLM(detoxigen=scripted()), way, temprature=0.5)


async def test_concurrent_async_calls_are_under_way_together() -> None:
    model = scripted(together=8)
    llm = DetoxiGenLLM(detoxigen=model)
    await asyncio.gather(*(llm.achat(HELLO) for _ in range(8)))
    assert model.most_active == 8


@pytest.mark.parametrize("way", ["acomplete", "achat"])
async def test_cancelling_a_task_frees_the_seat(way: str) -> None:
    model = scripted()
    with model.hold():
        task = asyncio.create_task(ask(DetoxiGenLLM(detoxigen=model), way))
        await asyncio.to_thread(model.wait_for, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert model.active == 0


async def test_leaving_a_stream_frees_the_seat() -> None:
    model = scripted()
    stream = DetoxiGenLLM(detoxigen=model).stream_chat(HELLO)
    next(stream)
    assert model.active == 1
    del stream
    assert model.active == 0
    astream = await DetoxiGenLLM(detoxigen=model).astream_chat(HELLO)
    await anext(astream)
    assert model.active == 1
    await astream.aclose()
    del astream
    await asyncio.to_thread(model.wait_for, 0)  # the event loop closes what the decorator dropped


# -- construction and metadata


def test_construction_loads_nothing_and_the_engine_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def shared(model: str | None = None, **options: Any) -> ScriptedDetoxiGen:
        asked.append((model, options))
        return scripted()

    monkeypatch.setattr(DetoxiGen, "shared", shared)
    llm = DetoxiGenLLM("org/model", detoxifier="folder", device="cpu", alpha=1.0)
    llm.to_dict(), llm.to_payload(), repr(llm)
    Settings.llm = llm
    assert asked == []
    llm.complete("Hello")
    options = {"detoxifier": "folder", "device": "cpu", "dtype": None, "revision": None}
    assert asked[0] == ("org/model", options)


async def test_loading_does_not_block_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []

    def shared(*args: Any, **options: Any) -> ScriptedDetoxiGen:
        threads.append(threading.current_thread())
        return scripted()

    monkeypatch.setattr(DetoxiGen, "shared", shared)
    await DetoxiGenLLM().acomplete("Hello")
    assert threads
    assert threading.main_thread() not in threads


@pytest.mark.parametrize(("chat", "tools"), [(False, False), (True, False), (True, True)])
def test_metadata_says_what_the_engine_can(chat: bool, tools: bool) -> None:
    metadata = DetoxiGenLLM(detoxigen=scripted(chat=chat, tools=tools)).metadata
    assert (metadata.is_chat_model, metadata.is_function_calling_model) == (chat, tools)
    assert (metadata.context_window, metadata.num_output, metadata.model_name) == (2048, 64, "scripted/words")


def test_metadata_of_unusual_engines() -> None:
    assert DetoxiGenLLM(detoxigen=scripted(context_window=None)).metadata.context_window > 100_000
    assert DetoxiGenLLM(detoxigen=scripted(context_window=64), max_new_tokens=64).metadata.num_output == 32
    assert DetoxiGenLLM(detoxigen=scripted(tools=False), function_calling=True).metadata.is_function_calling_model


def test_round_trip_through_a_dict() -> None:
    llm = DetoxiGenLLM("org/model", detoxifier="folder", alpha=3.0, stop=["x"], system_prompt="Be kind.")
    data = json.loads(json.dumps(llm.to_dict()))
    again = DetoxiGenLLM.from_dict(data)
    assert again.to_dict() == llm.to_dict()
    assert (again.model, again.detoxifier, again.system_prompt) == ("org/model", "folder", "Be kind.")
    assert DecodingParams(**again.decoding) == DecodingParams(alpha=3.0, stop=("x",))
    assert data["class_name"] == "DetoxiGenLLM"


@pytest.mark.parametrize("bad", [{"alpha": -1.0}, {"temperature": "hot"}, {"alhpa": 1.0}, {"max_new_tokens": 0}])
def test_a_bad_field_is_named_when_constructing(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidParamsError, match=next(iter(bad))):
        DetoxiGenLLM(**bad)


def test_prompts_are_packed_by_the_models_own_tokenizer() -> None:
    llm = DetoxiGenLLM(detoxigen=scripted(context_window=120), max_new_tokens=20)
    helper = PromptHelper.from_llm_metadata(llm.metadata, tokenizer=llm.encode)
    chunks = helper.repack(PromptTemplate("{context_str}"), ["one two three " * 100])
    assert len(chunks) > 1
    assert all(len(llm.encode(chunk)) <= 100 for chunk in chunks)


@pytest.mark.parametrize("way", WAYS)
async def test_token_counters_read_our_usage(way: str) -> None:
    counter = TokenCountingHandler(tokenizer=lambda _: pytest.fail("counted by a foreign tokenizer"))
    llm = DetoxiGenLLM(detoxigen=scripted(), callback_manager=CallbackManager([counter]))
    await ask(llm, way)
    assert counter.completion_llm_token_count == len(CLEAN.split())
    assert counter.prompt_llm_token_count == 5


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


# -- options from outside


async def test_options_reach_calls_that_pass_none() -> None:
    model = scripted()
    llm = DetoxiGenLLM(detoxigen=model, alpha=1.0)
    prompt = PromptTemplate("Say {what}.")
    with detox_options(alpha=3.0, seed=5) as outer:
        llm.predict(prompt, what="yes")
        with detox_options(alpha=4.0):
            await llm.apredict(prompt, what="no")
        assert len(outer) == 2
    llm.predict(prompt, what="maybe")
    assert [(params.alpha, params.seed) for *_, params in model.calls] == [(3.0, 5), (4.0, 5), (1.0, None)]
    assert len(outer) == 2
    assert outer[0].text == CLEAN


@pytest.mark.parametrize(
    "bad",
    [{"alpha": -1.0}, {"temperature": "hot"}, {"alhpa": 1.0}, {"guard": {"threshold": 2.0}}, {"tools": []}],
)
def test_a_bad_option_from_outside_is_named_on_entering(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidParamsError, match=next(iter(bad))), detox_options(**bad):
        pytest.fail("entered")


@pytest.mark.parametrize("name", ["model", "detoxifier", "device", "dtype", "revision"])
def test_an_engine_takes_no_names_beside_it(name: str) -> None:
    with pytest.raises(InvalidParamsError, match=name) as raised:
        DetoxiGenLLM(detoxigen=scripted(), **{name: "other"})
    assert raised.value.field == "detoxigen"
    with pytest.raises(InvalidParamsError, match=name):
        DetoxiGenLLM(detoxigen=scripted()).model_copy(update={name: "other"})
    with pytest.raises(InvalidParamsError, match=name):
        DetoxiGenLLM(**{name: "other"}).model_copy(update={"detoxigen": scripted()})
    llm = DetoxiGenLLM(detoxigen=scripted())
    with pytest.raises(InvalidParamsError, match=name):
        setattr(llm, name, "other")
    assert getattr(llm, name) is None


def test_a_copy_may_change_an_engine_for_a_name_and_back() -> None:
    named = DetoxiGenLLM(detoxigen=scripted()).model_copy(update={"model": "other", "detoxigen": None})
    assert (named.model, named.detoxigen) == ("other", None)
    again = named.model_copy(update={"detoxigen": scripted(), "model": None})
    assert again.complete("When?").text == CLEAN


@pytest.mark.parametrize("other", [5, "other"])
def test_a_model_that_is_none_is_an_error(other: Any) -> None:
    with pytest.raises(InvalidParamsError) as raised:
        DetoxiGenLLM(detoxigen=other)
    assert raised.value.field == "detoxigen"


def test_llama_cpp_is_said_as_its_users_say_it() -> None:
    llm = DetoxiGenLLM("some.gguf", engine="llamacpp", n_ctx=2048, model_kwargs={"n_gpu_layers": -1})
    assert llm.loading == {"engine": "llamacpp", "n_ctx": 2048, "model_kwargs": {"n_gpu_layers": -1}}
    with pytest.raises(InvalidParamsError, match=r"n_ctx.*engine"):
        DetoxiGenLLM("some.gguf", n_ctx=2048)
    with pytest.raises(InvalidParamsError, match="engine"):
        DetoxiGenLLM(engine="vllm")
