"""DetoxiGenLLM against a scripted model: the list that no upstream suite has, one test each."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from detox_guard import DecodingParams, DetoxiGen, InvalidParamsError, PromptTooLongError, StepError
from detox_guard.errors import NotPicklableError
from detox_guard.testing import ScriptedDetoxiGen
from langchain_core import exceptions
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.load import dumpd, dumps, load
from langchain_core.runnables import ConfigurableField

from langchain_detox_guard import DetoxiGenLLM
from langchain_scripts import LONG


class Log(BaseCallbackHandler):
    """Every callback, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def on_llm_start(self, serialized: Any, prompts: list[str], **kwargs: Any) -> None:
        self.events.append(("start", kwargs))

    def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
        self.events.append(("token", token))

    def on_llm_end(self, response: Any, **kwargs: Any) -> None:
        self.events.append(("end", response))

    def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
        self.events.append(("error", (error, kwargs["response"])))

    def of(self, kind: str) -> list[Any]:
        return [value for name, value in self.events if name == kind]


class AsyncLog(Log, AsyncCallbackHandler):
    async def on_llm_start(self, *args: Any, **kwargs: Any) -> None:
        Log.on_llm_start(self, *args, **kwargs)

    async def on_llm_new_token(self, *args: Any, **kwargs: Any) -> None:
        Log.on_llm_new_token(self, *args, **kwargs)

    async def on_llm_end(self, *args: Any, **kwargs: Any) -> None:
        Log.on_llm_end(self, *args, **kwargs)

    async def on_llm_error(self, *args: Any, **kwargs: Any) -> None:
        Log.on_llm_error(self, *args, **kwargs)


# -- construction and parameters


def test_construction_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DetoxiGen, "shared", lambda *_, **__: pytest.fail("loaded"))
    llm = DetoxiGenLLM(model="some/model", alpha=3.0)
    assert str(llm)
    assert repr(llm)
    assert dumpd(llm)
    assert llm.model_copy(update={"alpha": 1.0}).alpha == 1.0


def test_the_shared_engine_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, detoxigen: ScriptedDetoxiGen) -> None:
    asked = []

    def shared(model: str | None = None, **names: Any) -> ScriptedDetoxiGen:
        asked.append((model, names))
        return detoxigen

    monkeypatch.setattr(DetoxiGen, "shared", shared)
    llm = DetoxiGenLLM(model="some/model", detoxifier="some/prompt", dtype="float32", seed=1)
    llm.invoke("Hi", alpha=3.0)
    llm.invoke("Hi", model="other/model")
    names = {"detoxifier": "some/prompt", "dtype": "float32"}
    assert asked == [("some/model", names), ("other/model", names)]


def test_defaults_are_the_cores(detoxigen: ScriptedDetoxiGen) -> None:
    DetoxiGenLLM(detoxigen=detoxigen).invoke("Hi")
    assert detoxigen.calls[-1][2] == DecodingParams()


@pytest.mark.parametrize("bad", [{"alpha": -1.0}, {"top_p": 0.0}, {"rule": "other"}, {"apha": 2.0}, {"stop": [""]}])
def test_bad_fields_are_named_at_once(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidParamsError, match=next(iter(bad))):
        DetoxiGenLLM(**bad)


@pytest.mark.parametrize("bad", [{"alpha": -1.0}, {"apha": 2.0}, {"detoxigen": object()}])
def test_bad_keywords_are_named(llm: DetoxiGenLLM, bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidParamsError, match=next(iter(bad))):
        llm.invoke("Hi", **bad)


def test_every_keyword_reaches_the_engine(llm: DetoxiGenLLM, detoxigen: ScriptedDetoxiGen) -> None:
    changes: dict[str, Any] = {
        "alpha": 3.0, "rule": "detoxigen", "plausibility": 0.1, "temperature": 0.5, "top_p": 0.8, "top_k": 5,
        "repetition_penalty": 1.1, "seed": 4,
    }  # fmt: skip
    llm.invoke("Hi", stop=["never"], max_tokens=9, **changes)
    assert detoxigen.calls[-1][2] == DecodingParams(**changes, max_new_tokens=9, stop=("never",))
    list(llm.stream("Hi", stop=["never"], max_tokens=9, **changes))
    assert detoxigen.calls[-1][2] == DecodingParams(**changes, max_new_tokens=9, stop=("never",))
    assert llm.alpha == 3.0


# -- batching


def test_batch_is_one_call_and_callbacks_see_its_size(llm: DetoxiGenLLM, detoxigen: ScriptedDetoxiGen) -> None:
    log = Log()
    texts = llm.batch(["a", "b", "c"], {"callbacks": [log]})
    assert detoxigen.batch_sizes == [3]
    assert [start["batch_size"] for start in log.of("start")] == [3, 3, 3]
    assert len(log.of("end")) == 3
    assert texts == [llm.invoke(p) for p in "abc"]


async def test_abatch(llm: DetoxiGenLLM, detoxigen: ScriptedDetoxiGen) -> None:
    log = AsyncLog()
    texts = await llm.abatch(["a", "b", "c"], {"callbacks": [log]})
    assert texts == [llm.invoke(p) for p in "abc"]
    assert [start["batch_size"] for start in log.of("start")] == [3, 3, 3]


def test_max_concurrency_is_the_native_batch_size(llm: DetoxiGenLLM, detoxigen: ScriptedDetoxiGen) -> None:
    llm.batch(["a", "b", "c", "d", "e"], {"max_concurrency": 2})
    assert detoxigen.batch_sizes == [2, 2, 1]


@pytest.mark.parametrize("is_async", [False, True])
async def test_one_bad_prompt_is_isolated(llm: DetoxiGenLLM, is_async: bool) -> None:
    log = AsyncLog() if is_async else Log()
    config: Any = {"callbacks": [log]}
    prompts = ["a", LONG, "b"]
    if is_async:
        first, bad, last = await llm.abatch(prompts, config, return_exceptions=True)
    else:
        first, bad, last = llm.batch(prompts, config, return_exceptions=True)
    assert [first, last] == [llm.invoke("a"), llm.invoke("b")]
    assert isinstance(bad, PromptTooLongError)
    assert len(log.of("start")) == 3
    assert len(log.of("end")) == 2
    assert len(log.of("error")) == 1


def test_isolated_prompts_run_together() -> None:
    detoxigen = ScriptedDetoxiGen(together=16)
    DetoxiGenLLM(detoxigen=detoxigen).batch(["a"] * 16, return_exceptions=True)
    assert detoxigen.most_active == 16


def test_a_bad_prompt_raises_otherwise(llm: DetoxiGenLLM) -> None:
    with pytest.raises(PromptTooLongError):
        llm.batch(["a", LONG])


# -- streams and callbacks


async def test_all_ways_say_the_same(llm: DetoxiGenLLM) -> None:
    text = llm.invoke("Hi")
    assert "".join(llm.stream("Hi")) == text
    assert await llm.ainvoke("Hi") == text
    assert "".join([piece async for piece in llm.astream("Hi")]) == text
    assert llm.batch(["Hi", "Ho"])[0] == text
    assert (await llm.abatch(["Ho", "Hi"]))[1] == text
    assert llm.invoke("Hi", streaming=True) == text


async def test_astream_is_native(llm: DetoxiGenLLM, detoxigen: ScriptedDetoxiGen) -> None:
    assert len([piece async for piece in llm.astream("Hi")]) > 3
    assert [how for how, _, _ in detoxigen.calls] == ["astream"]


@pytest.mark.parametrize("streaming", [False, True])
async def test_callbacks_fire_exactly_once(llm: DetoxiGenLLM, streaming: bool) -> None:
    for way in ("invoke", "stream", "ainvoke", "astream"):
        log = AsyncLog() if way.startswith("a") else Log()
        bound = llm.with_config(callbacks=[log])
        if way == "invoke":
            bound.invoke("Hi", streaming=streaming)
        elif way == "stream":
            list(bound.stream("Hi"))
        elif way == "ainvoke":
            await bound.ainvoke("Hi", streaming=streaming)
        else:
            _ = [piece async for piece in bound.astream("Hi")]
        assert len(log.of("start")) == len(log.of("end")) == 1, way
        text = log.of("end")[0].generations[0][0].text
        expects_tokens = streaming or "stream" in way
        assert "".join(log.of("token")) == (text if expects_tokens else ""), way


def test_an_error_while_streaming_carries_what_was_said(llm: DetoxiGenLLM) -> None:
    log = Log()
    with pytest.raises(StepError):
        list(llm.stream("break", {"callbacks": [log]}))
    ((error, response),) = log.of("error")
    assert isinstance(error, StepError)
    assert response.generations[0][0].text == "Hello, dear "
    assert not log.of("end")


@pytest.mark.parametrize("way", ["invoke", "stream", "ainvoke", "astream"])
async def test_an_engine_error_surfaces_at_once(llm: DetoxiGenLLM, way: str) -> None:
    async def run() -> None:
        if way == "ainvoke":
            await llm.ainvoke("break")
        elif way == "astream":
            _ = [piece async for piece in llm.astream("break")]
        else:
            list(getattr(llm, way)("break"))

    with pytest.raises(StepError):
        await run()


def test_errors_are_langchains_too(llm: DetoxiGenLLM) -> None:
    with pytest.raises(exceptions.ContextOverflowError) as caught:
        llm.invoke(LONG)
    assert isinstance(caught.value, PromptTooLongError)
    assert caught.value.field == "prompt"
    assert str(caught.value) == str(caught.value.__cause__)


# -- stop strings


@pytest.mark.parametrize("stop", [["reader!"], ["ear read"], ["!", "dear"], ["nowhere"]])
async def test_stop_strings_per_call_and_of_the_model(detoxigen: ScriptedDetoxiGen, stop: list[str]) -> None:
    plain = DetoxiGenLLM(detoxigen=detoxigen, seed=1)
    stopping = DetoxiGenLLM(detoxigen=detoxigen, seed=1, stop=stop)
    whole = plain.invoke("Hi")
    expected = whole[: min([whole.find(s) for s in stop if s in whole], default=len(whole))]
    assert plain.invoke("Hi", stop=stop) == stopping.invoke("Hi") == expected
    assert "".join(plain.stream("Hi", stop=stop)) == "".join(stopping.stream("Hi")) == expected
    assert plain.bind(stop=stop).batch(["Hi"]) == stopping.batch(["Hi"]) == [expected]
    assert await plain.ainvoke("Hi", stop=stop) == await stopping.ainvoke("Hi") == expected
    assert stopping.invoke("Hi", stop=["fine"]) == whole.split("fine")[0]


def test_one_stop_string_is_not_its_letters(llm: DetoxiGenLLM) -> None:
    assert llm.invoke("Hi", stop="reader") == "".join(llm.stream("Hi", stop="reader")) == "Hello, dear "


# -- what it reports


def test_usage_and_finish_reason(llm: DetoxiGenLLM) -> None:
    result = llm.generate(["one two", "three"], max_tokens=4)
    assert result.llm_output == {
        "model_name": "scripted/words",
        "token_usage": {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11},
    }
    info = result.generations[0][0].generation_info
    assert info is not None
    assert info["finish_reason"] == "length"
    assert info["token_usage"] == {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}
    assert info["detox"]["alpha"] == 3.0
    assert info["detox"]["seed"] == 1


def test_the_last_chunk_alone_reports(llm: DetoxiGenLLM) -> None:
    chunks = list(llm._stream("Hi"))
    assert [chunk.generation_info for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].generation_info == llm.generate(["Hi"]).generations[0][0].generation_info


def test_tracing_parameters(llm: DetoxiGenLLM) -> None:
    assert llm._get_ls_params() == {
        "ls_provider": "detox_guard", "ls_model_type": "llm", "ls_model_name": "scripted/words",
        "ls_temperature": 1.0, "ls_max_tokens": 256,
    }  # fmt: skip
    named = DetoxiGenLLM(model="some/model", stop=["x"])
    assert named._get_ls_params()["ls_model_name"] == "some/model"
    assert named._get_ls_params()["ls_stop"] == ["x"]
    changed = named._get_ls_params(stop=["y"], model="other/model", temperature=0.5, max_tokens=3)
    assert (changed["ls_model_name"], changed["ls_temperature"], changed["ls_max_tokens"], changed["ls_stop"]) == (
        "other/model", 0.5, 3, ["y"],
    )  # fmt: skip


def test_tokens_are_the_models_own(llm: DetoxiGenLLM, detoxigen: ScriptedDetoxiGen) -> None:
    assert llm.get_token_ids("some four word text") == detoxigen.encode("some four word text")
    assert llm.get_num_tokens("some four word text") == 4


# -- configuration, serialization


def test_configurable_fields_keep_the_engine(llm: DetoxiGenLLM, detoxigen: ScriptedDetoxiGen) -> None:
    configurable = llm.configurable_fields(alpha=ConfigurableField(id="alpha"))
    configurable.invoke("Hi", {"configurable": {"alpha": 3.5}})
    assert detoxigen.calls[-1][2].alpha == 3.5
    other = llm.configurable_alternatives(
        ConfigurableField(id="llm"), mild=DetoxiGenLLM(detoxigen=detoxigen, alpha=0.5)
    )
    other.invoke("Hi", {"configurable": {"llm": "mild"}})
    assert detoxigen.calls[-1][2].alpha == 0.5


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
def test_serialization_is_names_and_numbers() -> None:
    llm = DetoxiGenLLM(model="some/model", alpha=3.0, stop=["x"], seed=5)
    again = load(
        dumpd(llm), valid_namespaces=["langchain_detox_guard"], allowed_objects=[DetoxiGenLLM], secrets_from_env=False
    )
    assert again == llm
    assert len(dumps(llm)) < 600
    assert pickle.loads(pickle.dumps(llm)) == llm


def test_an_engine_of_ones_own_is_never_serialized(llm: DetoxiGenLLM) -> None:
    assert dumpd(llm)["type"] == "not_implemented"
    assert "ScriptedDetoxiGen" not in dumps(llm)
    with pytest.raises(NotPicklableError, match="detoxigen"):
        pickle.dumps(llm)


def test_saving_writes_no_weights_and_no_paths(llm: DetoxiGenLLM) -> None:
    params = llm._identifying_params
    assert params["model"] == "scripted/words"
    assert params["detoxifier"] == ["-1:0123456789ab"]
    assert {"alpha", "temperature", "top_p", "seed", "stop", "version", "guard"} <= params.keys()
