"""What was cut or broken off is no structured answer and no call, and no error of ours ends as an answer."""

from __future__ import annotations

import pickle
import warnings
from typing import TYPE_CHECKING, Any

import pytest
from llama_index.core import Document, Settings, VectorStoreIndex
from llama_index.core.agent.react.formatter import ReActChatFormatter
from llama_index.core.agent.react.output_parser import ReActOutputParser
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.output_parsers import PydanticOutputParser
from llama_index.core.program import FunctionCallingProgram, LLMTextCompletionProgram
from llama_index.core.prompts import PromptTemplate
from llama_index.core.response_synthesizers import ResponseMode, get_response_synthesizer
from llama_index.core.tools import FunctionTool
from llama_index.core.types import PydanticProgramMode
from llama_index.llms.detox_guard import (
    DetoxiGenLLM,
    IncompleteAnswerError,
    RefusedCallError,
    get_detox_response_synthesizer,
)
from llama_index_harness import CLEAN, QUERY, BagEmbedding, memory, nodes, scripted
from pydantic import BaseModel, field_validator

from detox_guard import DetoxGuardError, GuardPolicy, InvalidParamsError, ScorerError, StepError
from detox_guard.testing import ScriptedDetoxiGen, ScriptedScorer

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [  # of LlamaIndex's own
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:is_running called from within a step:DeprecationWarning"),
]
PROMPT = PromptTemplate("Describe {what}.")
CUTS = ["length", "guard"]


class Book(BaseModel):
    """A book."""

    title: str
    pages: int = 0


def add(a: int, b: int) -> int:
    """The sum of two numbers."""
    return a + b


TOOLS = [FunctionTool.from_defaults(add)]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
BOOK_CALL = '<tool_call>\n{"name": "Book", "arguments": {"title": "Emma", "pages": 474}}\n</tool_call>'
BOOK = '{"title": "Emma", "pages": 474}'


def cut_off(reply: str, finish: str, **options: Any) -> DetoxiGenLLM:
    return DetoxiGenLLM(detoxigen=scripted([reply[:-25]], finish=finish), **options)


# -- structured answers


async def of_stream(stream: Any) -> Any:
    return [one async for one in await stream][-1]


STRUCTURED: dict[str, Any] = {
    "structured_predict": lambda llm: llm.structured_predict(Book, PROMPT, what="Emma"),
    "astructured_predict": lambda llm: llm.astructured_predict(Book, PROMPT, what="Emma"),
    "stream_structured_predict": lambda llm: list(llm.stream_structured_predict(Book, PROMPT, what="Emma"))[-1],
    "astream_structured_predict": lambda llm: of_stream(llm.astream_structured_predict(Book, PROMPT, what="Emma")),
    "structured LLM": lambda llm: llm.as_structured_llm(Book).chat([ChatMessage("Emma?")]).raw,
    "structured LLM, complete": lambda llm: llm.as_structured_llm(Book).complete("Emma?").raw,
    "structured LLM, stream": lambda llm: list(llm.as_structured_llm(Book).stream_chat([ChatMessage("Emma?")]))[-1].raw,
    "structured LLM, async": lambda llm: llm.as_structured_llm(Book).achat([ChatMessage("Emma?")]),
    "structured LLM, async stream": lambda llm: of_stream(
        llm.as_structured_llm(Book).astream_chat([ChatMessage("Emma?")])
    ),
    "text program": lambda llm: text_program(llm)(what="Emma"),
    "text program, async": lambda llm: text_program(llm).acall(what="Emma"),
    "text program, stream": lambda llm: list(text_program(llm).stream_call(what="Emma"))[-1],
    "text program, async stream": lambda llm: of_stream(text_program(llm).astream_call(what="Emma")),
}


def text_program(llm: DetoxiGenLLM) -> Any:
    return LLMTextCompletionProgram.from_defaults(output_parser=PydanticOutputParser(Book), prompt=PROMPT, llm=llm)


def function_program(llm: DetoxiGenLLM) -> Any:
    return FunctionCallingProgram.from_defaults(output_cls=Book, prompt=PROMPT, llm=llm)


async def result_of(made: Any) -> Any:
    made = await made if hasattr(made, "__await__") else made
    return getattr(made, "raw", made)


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
@pytest.mark.parametrize("way", STRUCTURED)
async def test_a_structured_answer_is_whole_or_an_error(way: str, chat: bool) -> None:
    whole = DetoxiGenLLM(detoxigen=scripted([BOOK], chat=chat, tools=chat))
    assert await result_of(STRUCTURED[way](whole)) == Book(title="Emma", pages=474)
    for finish in CUTS:
        # Cut behind the title, which is all that the class asks for: upstream would repair and take it.
        llm = DetoxiGenLLM(detoxigen=scripted([BOOK[:-13]], chat=chat, tools=chat, finish=finish))
        with pytest.raises(IncompleteAnswerError, match=finish) as caught:
            await result_of(STRUCTURED[way](llm))
        assert caught.value.finish_reason == finish
        assert caught.value.text == BOOK[:-13]
        assert not isinstance(caught.value, ValueError)


FUNCTIONS: dict[str, Any] = {
    "program": lambda llm: function_program(llm)(what="Emma"),
    "program, async": lambda llm: function_program(llm).acall(what="Emma"),
    "program, stream": lambda llm: list(function_program(llm).stream_call(what="Emma"))[-1],
    "program, async stream": lambda llm: of_stream(function_program(llm).astream_call(what="Emma")),
    **{name: ask for name, ask in STRUCTURED.items() if "predict" in name},
}


@pytest.mark.parametrize("way", FUNCTIONS)
async def test_an_answer_through_a_call_is_whole_or_an_error(way: str) -> None:
    mode = {"pydantic_program_mode": PydanticProgramMode.FUNCTION}
    model = scripted([BOOK_CALL])
    assert await result_of(FUNCTIONS[way](DetoxiGenLLM(detoxigen=model, **mode))) == Book(title="Emma", pages=474)
    assert model.calls[0].params.grammar is not None  # forced, in streams too
    for finish in CUTS:
        with pytest.raises(IncompleteAnswerError, match=finish):
            await result_of(FUNCTIONS[way](cut_off(BOOK_CALL, finish, **mode)))


class Picky(BaseModel):
    title: str

    @field_validator("title")
    @classmethod
    def _long(cls, title: str) -> str:
        if len(title) < 10:
            raise ValueError("too short")
        return title


async def test_the_last_of_a_stream_is_valid() -> None:
    llm = DetoxiGenLLM(detoxigen=scripted(['{"title": "Emma"}']))
    with pytest.raises(ValueError, match="too short"):
        list(llm.stream_structured_predict(Picky, PROMPT, what="Emma"))
    with pytest.raises(ValueError, match="too short"):
        await of_stream(llm.astream_structured_predict(Picky, PROMPT, what="Emma"))


def test_the_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(IncompleteAnswerError("length", '{"a": ')))
    assert (type(error), error.finish_reason, error.text) == (IncompleteAnswerError, "length", '{"a": ')
    assert "max_new_tokens" in error.hint
    refused = pickle.loads(
        pickle.dumps(RefusedCallError(InvalidParamsError("alpha", -1, "at least 0", hint="raise it")))
    )
    assert (refused.field, refused.value, refused.bound, refused.hint) == ("alpha", -1, "at least 0", "raise it")


@pytest.mark.parametrize("finish", CUTS)
def test_plain_text_may_end_anywhere(finish: str) -> None:
    llm = DetoxiGenLLM(detoxigen=scripted([CLEAN], finish=finish))
    assert llm.complete("a").raw["finish_reason"] == finish
    assert llm.chat_with_tools(TOOLS, "a").message.content == CLEAN


# -- calls


@pytest.mark.parametrize("forced", [True, False], ids=["forced", "free"])
@pytest.mark.parametrize("finish", CUTS)
async def test_a_call_is_whole_or_an_error(finish: str, forced: bool) -> None:
    llm, options = cut_off(CALL, finish), {"tool_required": forced}
    with pytest.raises(IncompleteAnswerError, match=finish):
        llm.predict_and_call(TOOLS, "Sum?", **options)
    with pytest.raises(IncompleteAnswerError, match=finish):
        await llm.apredict_and_call(TOOLS, "Sum?", **options)


@pytest.mark.parametrize("forced", [True, False], ids=["forced", "free"])
@pytest.mark.parametrize("streaming", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("finish", CUTS)
async def test_an_agent_stops_at_a_call_that_is_not_whole(finish: str, streaming: bool, forced: bool) -> None:
    llm = cut_off(CALL, finish)
    options = {"initial_tool_choice": "add"} if forced else {}
    agent = FunctionAgent(tools=TOOLS, llm=llm, streaming=streaming, **options)
    with pytest.raises(IncompleteAnswerError, match=finish):
        await agent.run("Sum?", memory=memory())
    assert len(llm.detoxigen.calls) == 1


async def test_an_agents_structured_answer_is_none_if_it_is_not_whole() -> None:
    model = scripted(lambda *_: BOOK[:-13], finish="length")
    agent = FunctionAgent(tools=TOOLS, llm=DetoxiGenLLM(detoxigen=model), output_cls=Book)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = await agent.run("Emma?", memory=memory())
    assert result.structured_response is None
    assert any("length" in str(one.message) for one in told)


# -- errors inside LlamaIndex


def query_engine(llm: DetoxiGenLLM, *, hook: bool = False, **options: Any) -> Any:
    Settings.llm, Settings.tokenizer = llm, llm.encode
    index = VectorStoreIndex.from_documents([Document(text="It opens at nine.")], embed_model=BagEmbedding())
    build = get_detox_response_synthesizer if hook else get_response_synthesizer
    return index.as_query_engine(response_synthesizer=build(llm=llm, **options))


class Refusing(ScriptedDetoxiGen):
    """Prepares no request, as where a grammar cannot be enforced or an audit log cannot be written."""

    error: Exception = InvalidParamsError("audit_log", "/nowhere/log", "a file that can be written")

    def stream(self, prompt: Any, params: Any) -> Any:
        raise self.error

    async def astream(self, prompt: Any, params: Any) -> Any:
        raise self.error
        yield


async def read(response: Any) -> str:
    response = await response if hasattr(response, "__await__") else response
    stream = getattr(response, "response_gen", None)
    if stream is None:
        return str(response)
    return "".join([piece async for piece in stream]) if hasattr(stream, "__aiter__") else "".join(stream)


@pytest.mark.parametrize("hook", [False, True], ids=["plain", "hook"])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("mode", [mode for mode in ResponseMode if mode not in ("no_text", "context_only")])
async def test_a_refused_call_is_no_empty_response(mode: ResponseMode, streaming: bool, hook: bool) -> None:
    if streaming and "accumulate" in mode.value:
        pytest.skip("llama-index-core: 'Unable to stream in Accumulate response mode'")
    engine = query_engine(DetoxiGenLLM(detoxigen=Refusing()), hook=hook, response_mode=mode, streaming=streaming)
    for ask in (engine.query, engine.aquery):
        # Where nothing of LlamaIndex's is in between, it is the LLM's own error.
        with pytest.raises((RefusedCallError, InvalidParamsError), match="audit_log") as caught:
            await read(ask(QUERY))
        assert (caught.value.field, caught.value.value) == ("audit_log", "/nowhere/log")


@pytest.mark.parametrize("hook", [False, True], ids=["plain", "hook"])
@pytest.mark.parametrize("options", [{"output_cls": Book}, {"structured_answer_filtering": True}], ids=str)
async def test_so_it_is_in_structured_modes(options: dict[str, Any], hook: bool) -> None:
    engine = query_engine(DetoxiGenLLM(detoxigen=Refusing()), hook=hook, **options)
    with pytest.raises(RefusedCallError, match="audit_log"):
        engine.query(QUERY)
    with pytest.raises(RefusedCallError, match="audit_log"):
        await engine.aquery(QUERY)


@pytest.mark.parametrize("hook", [False, True], ids=["plain", "hook"])
async def test_a_cut_structured_answer_is_no_empty_response(hook: bool) -> None:
    engine = query_engine(DetoxiGenLLM(detoxigen=scripted([BOOK[:-13]], finish="length")), hook=hook, output_cls=Book)
    with pytest.raises(IncompleteAnswerError, match="length"):
        engine.query(QUERY)
    with pytest.raises(IncompleteAnswerError, match="length"):
        await engine.aquery(QUERY)


def test_a_direct_call_is_refused_by_its_own_error() -> None:
    for ask in (lambda llm: llm.chat([ChatMessage("a")]), lambda llm: list(llm.stream_complete("a"))):
        with pytest.raises(InvalidParamsError, match="audit_log"):
            ask(DetoxiGenLLM(detoxigen=Refusing()))
    with pytest.raises(InvalidParamsError, match="audit_log"):
        DetoxiGenLLM(detoxigen=Refusing()).structured_predict(Book, PROMPT, what="Emma")


def react() -> dict[str, Any]:
    return {
        "react_chat_formatter": ReActChatFormatter(),
        "output_parser": ReActOutputParser(),
        "memory": memory(),
    }


@pytest.mark.parametrize("error", [StepError("no step"), ScorerError("no score"), Refusing.error])
async def test_what_fails_in_a_react_step_is_no_answer(error: DetoxGuardError) -> None:
    engine = Refusing(tools=False)
    engine.error = error
    llm = DetoxiGenLLM(detoxigen=engine)
    with pytest.raises(type(error)):
        llm.predict_and_call(TOOLS, "Sum?", **react())
    with pytest.raises(type(error)):
        await llm.apredict_and_call(TOOLS, "Sum?", **react())


async def test_a_react_step_that_works_is_upstreams() -> None:
    step = 'Thought: I need a tool.\nAction: add\nAction Input: {"a": 1, "b": 2}\n'
    llm = DetoxiGenLLM(detoxigen=scripted([step], tools=False))
    assert llm.predict_and_call(TOOLS, "Sum?", **react()).response == "3"
    assert (await llm.apredict_and_call(TOOLS, "Sum?", **react())).response == "3"


# -- the real engine


@pytest.fixture(scope="module")
def real() -> DetoxiGenLLM:
    return DetoxiGenLLM(seed=3, max_new_tokens=6)


def test_an_audit_log_that_cannot_be_written(real: DetoxiGenLLM, tmp_path: Path) -> None:
    guard = GuardPolicy(scorer=ScriptedScorer("stupid"), audit_log=str(tmp_path / "none" / "log"))
    llm = DetoxiGenLLM(detoxigen=real.load(), guard=guard)
    with pytest.raises(InvalidParamsError, match="audit_log"):
        llm.complete("a")
    with pytest.raises(RefusedCallError, match="audit_log"):
        query_engine(llm).query(QUERY)


def test_a_grammar_that_cannot_be_enforced(real: DetoxiGenLLM) -> None:
    class Odd(BaseModel):
        model_config = {"json_schema_extra": {"type": "nothing"}}
        title: str

    with pytest.raises(InvalidParamsError, match="grammar"):
        real.structured_predict(Odd, PROMPT, what="Emma")
    with pytest.raises(RefusedCallError, match="grammar"):
        query_engine(real, output_cls=Odd).query(QUERY)


class Long(BaseModel):
    chapters: list[Book]
    author: Book
    publisher: Book


async def test_a_real_answer_that_does_not_fit(real: DetoxiGenLLM) -> None:
    for way in ("structured_predict", "stream_structured_predict"):
        with pytest.raises(IncompleteAnswerError, match="length"):
            list(getattr(real, way)(Long, PROMPT, llm_kwargs={"max_new_tokens": 3}, what="Emma"))
    hook = get_detox_response_synthesizer(real, output_cls=Long, response_mode="tree_summarize")
    with pytest.raises(IncompleteAnswerError, match="length"):
        hook.synthesize(QUERY, nodes("a"))


async def test_an_agent_tells_of_a_cut_structured_answer_by_a_warning_and_none() -> None:
    """Upstream swallows every error there. Asked by itself, the structured LLM raises."""

    def reply(prompt: Any, _: Any) -> str:
        return '{"title": ' if "provided schema" in str(prompt) else "At nine."

    llm = DetoxiGenLLM(detoxigen=scripted(reply, finish="length"))
    tool = FunctionTool.from_defaults(lambda: "nine", name="hours", description="Opening hours.")
    agent = FunctionAgent(tools=[tool], llm=llm, output_cls=Book)
    with pytest.warns(UserWarning, match="cut off"):
        output = await agent.run(QUERY, memory=memory())
    assert output.structured_response is None
    with pytest.raises(IncompleteAnswerError):
        await llm.as_structured_llm(Book).achat([ChatMessage("Use the provided schema.")])
