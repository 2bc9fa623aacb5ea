"""What was configured stays so, or the way there is refused by name."""

from __future__ import annotations

import copy
import pickle
from typing import Annotated, Any

import pytest
from detox_guard import (
    DecodingParams,
    DetoxiGen,
    EngineBusyError,
    GuardPolicy,
    InvalidParamsError,
    PromptTooLongError,
)
from detox_guard.testing import ScriptedDetoxiGen
from langchain_core import exceptions
from pydantic import TypeAdapter

from langchain_detox_guard import ChatDetoxiGen, DetoxDocumentScreen, DetoxMiddleware
from langchain_detox_guard._errors import as_langchain
from langchain_scripts import BOTH, asked, look_up

# -- bad values

BAD = [
    {"temperature": "warm"}, {"temperature": None}, {"alpha": [1]}, {"top_k": 1.5}, {"max_tokens": 0}, {"seed": -1},
    {"guard": "strict"}, {"guard": {"threshold": 7}}, {"stop": 5}, {"stop": [""]}, {"rule": "other"}, {"top_p": True},
]  # fmt: skip


@BOTH
@pytest.mark.parametrize("bad", BAD, ids=str)
async def test_a_bad_value_is_named_wherever_it_is_given(
    kind: Any, bad: dict[str, Any], detoxigen: ScriptedDetoxiGen
) -> None:
    llm = kind(detoxigen=detoxigen)
    (field,) = bad
    for way in (
        lambda: kind(detoxigen=detoxigen, **bad),
        lambda: llm.invoke("Hi", **bad),
        lambda: list(llm.stream("Hi", **bad)),
        lambda: llm.batch(["Hi", "you"], **bad),
        lambda: list(llm.batch_as_completed(["Hi", "you"], **bad)),
        lambda: llm.bind(**bad),
        lambda: llm.with_retry(stop_after_attempt=1).bind(**bad).invoke("Hi"),
    ):
        with pytest.raises(InvalidParamsError) as told:
            way()
        assert told.value.field.split(".")[0] == field
    with pytest.raises(InvalidParamsError, match=field):
        await llm.ainvoke("Hi", **bad)
    with pytest.raises(InvalidParamsError, match=field):
        _ = [chunk async for chunk in llm.astream("Hi", **bad)]
    assert not detoxigen.calls


@BOTH
def test_a_call_reads_values_as_the_constructor_does(kind: Any, detoxigen: ScriptedDetoxiGen) -> None:
    given: Any = {"temperature": "0.5", "guard": {"threshold": 0.3}, "stop": "you"}
    kind(detoxigen=detoxigen, **given).invoke("Hi")
    built = asked(detoxigen)
    kind(detoxigen=detoxigen).invoke("Hi", **given)
    assert asked(detoxigen) == built
    assert (built.temperature, built.guard, built.stop) == (0.5, GuardPolicy(threshold=0.3), ("you",))


@BOTH
def test_what_was_assigned_is_checked_at_the_call(kind: Any, detoxigen: ScriptedDetoxiGen) -> None:
    llm = kind(detoxigen=detoxigen)
    llm.alpha = "much"
    with pytest.raises(InvalidParamsError, match="alpha"):
        llm.invoke("Hi")


@pytest.mark.parametrize("word", [5, "x", [5], [None]])
def test_tools_and_schemas_too(word: Any, detoxigen: ScriptedDetoxiGen) -> None:
    chat: Any = ChatDetoxiGen(detoxigen=detoxigen)
    for way in (lambda: chat.bind_tools(word), lambda: chat.invoke("Hi", tools=word)):
        with pytest.raises(InvalidParamsError, match="tools"):
            way()
    for method in ("json_schema", "function_calling", "json_mode"):
        with pytest.raises(InvalidParamsError, match="schema"):
            chat.with_structured_output(word, method=method)
    with pytest.raises(InvalidParamsError, match="parallel_tool_calls"):
        chat.bind_tools([look_up], parallel_tool_calls="no")
    with pytest.raises(InvalidParamsError, match="parallel_tool_calls"):
        chat.invoke("Hi", tools=[look_up], parallel_tool_calls="no")


@pytest.mark.parametrize(
    "bad", [{"ladder": 5}, {"ladder": None}, {"ladder": "rewrite"}, {"scorer": 5}, {"replacement": 5}], ids=str
)
def test_and_those_of_the_middleware_and_the_screen(bad: dict[str, Any]) -> None:
    (field,) = bad
    with pytest.raises(InvalidParamsError, match=field):
        DetoxMiddleware(**bad)
    for own in ({"threshold": True}, {"scorer": 5}):
        with pytest.raises(InvalidParamsError, match=next(iter(own))):
            DetoxDocumentScreen(**own)


@BOTH
def test_a_subclass_with_an_init_of_its_own_works(kind: Any, detoxigen: ScriptedDetoxiGen) -> None:
    class Own(kind):  # type: ignore[misc]
        """It takes an argument that is no field, and sets a default of its own."""

        def __init__(self, persona: str = "x", **kwargs: Any) -> None:
            super().__init__(**{"alpha": 9.0, **kwargs})
            self._persona = persona

        _persona: str = "none"

    model = Own("reader", detoxigen=detoxigen)
    model.invoke("Hi")
    assert asked(detoxigen).alpha == 9.0
    model.bind(alpha=2.0, seed=4).with_config(tags=["t"]).invoke("Hi")
    assert (asked(detoxigen).alpha, asked(detoxigen).seed) == (2.0, 4)
    twin = model.model_copy(update={"alpha": 1.0})
    assert (type(twin), twin.alpha, twin._persona, twin.detoxigen) == (Own, 1.0, "reader", detoxigen)
    with pytest.raises(InvalidParamsError, match="alpha"):
        model.invoke("Hi", alpha=-1)


# -- errors


@pytest.mark.parametrize(
    ("error", "theirs"),
    [
        (InvalidParamsError("alpha", object(), "at most 100", hint="h"), "ModelInvalidRequestError"),
        (PromptTooLongError("prompt", 9, "at most 8", hint="h"), "ContextOverflowError"),
        (EngineBusyError("full", hint="h"), "ModelRateLimitError"),
    ],
)
def test_a_twin_crosses_processes_as_itself(error: Any, theirs: str) -> None:
    sent = as_langchain(error)
    for twin in (pickle.loads(pickle.dumps(sent)), copy.deepcopy(sent), as_langchain(sent)):
        assert type(twin) is type(sent)
        assert isinstance(twin, type(error))
        assert (str(twin), twin.hint) == (str(error), "h")
        assert getattr(twin, "field", None) == getattr(error, "field", None)
        if (base := getattr(exceptions, theirs, None)) is not None:
            assert isinstance(twin, base)


# -- what the core says of its settings


@BOTH
@pytest.mark.parametrize("name", sorted(DecodingParams.model_fields))
def test_fields_are_the_cores(kind: Any, name: str) -> None:
    """Default, description and bounds: nothing is written twice."""
    if name in ("stop_token_ids", "ignore_eos", "grammar", "trace", "trace_top"):
        assert name not in kind.model_fields  # no setting of a LangChain model
        return
    core, ours = DecodingParams.model_fields[name], kind.model_fields[{"max_new_tokens": "max_tokens"}.get(name, name)]
    assert ours.description == core.description
    assert ours.default == (None if name == "stop" else core.default)
    if name != "guard":  # it has a field for a callable, which no schema tells
        bounds = TypeAdapter(Annotated[(core.annotation, *core.metadata, None)]).json_schema()
        assert ours.json_schema_extra == bounds


@BOTH
def test_every_field_says_what_it_is(kind: Any) -> None:
    from langchain_detox_guard._fields import ModelFields

    for name in kind.model_fields.keys() & vars(ModelFields)["__annotations__"].keys():
        assert kind.model_fields[name].description, name


@BOTH
def test_llama_cpp_is_said_as_its_users_say_it(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def shared(model: str | None = None, **names: Any) -> ScriptedDetoxiGen:
        asked.append(names)
        return ScriptedDetoxiGen()

    monkeypatch.setattr(DetoxiGen, "shared", shared)
    how = {"engine": "llamacpp", "n_ctx": 2048, "n_gpu_layers": -1, "n_threads": 4, "n_batch": 512, "type_k": 8}
    kind(model="some.gguf", **how).invoke("Hi")
    assert asked == [{"detoxifier": None, **how}]
    with pytest.raises(InvalidParamsError, match=r"n_ctx.*engine"):
        kind(model="some.gguf", n_ctx=2048)
    with pytest.raises(InvalidParamsError, match="engine"):
        kind(engine="vllm")
    own = ScriptedDetoxiGen()
    assert kind(engine=own).detoxigen is own  # the field's old name
