"""`DetoxiGenLLM` against LlamaIndex's contract, on a scripted model."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest
from llama_index.core import Settings
from llama_index.core.callbacks import CallbackManager, CBEventType, TokenCountingHandler
from llama_index.core.indices.prompt_helper import PromptHelper
from llama_index.core.prompts import PromptTemplate
from llama_index.llms.detox_guard import DetoxiGenLLM, detox_options
from llama_index_harness import CLEAN, Callbacks, recorded_events, scripted
from ways import HELLO, WAYS, ask

from detox_guard import DecodingParams, DetoxiGen, InvalidParamsError, StepError
from detox_guard.testing import ScriptedDetoxiGen


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
    own = ScriptedDetoxiGen()
    assert DetoxiGenLLM(engine=own).detoxigen is own  # the field's old name
