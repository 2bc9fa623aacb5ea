"""Options around a call hold for its whole answer, whoever reads it, wherever and whenever."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from llama_index.core import Document, Settings, VectorStoreIndex
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.chat_engine import CondenseQuestionChatEngine, SimpleChatEngine
from llama_index.core.evaluation import BatchEvalRunner, FaithfulnessEvaluator
from llama_index.core.extractors import SummaryExtractor
from llama_index.core.indices.query.query_transform import HyDEQueryTransform
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.llms import ChatMessage
from llama_index.core.program import FunctionCallingProgram, LLMTextCompletionProgram
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import TransformQueryEngine
from llama_index.core.response_synthesizers import CompactAndRefine, Refine, ResponseMode, TreeSummarize
from llama_index.core.schema import QueryBundle
from llama_index.core.tools import FunctionTool
from llama_index.llms.detox_guard import DetoxiGenLLM, detox_options, get_detox_response_synthesizer
from llama_index_harness import CLEAN, BagEmbedding, memory, nodes, scripted
from pydantic import BaseModel

from detox_guard import GuardPolicy
from detox_guard.testing import ScriptedDetoxiGen, ScriptedScorer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

POLICY = GuardPolicy(scorer=ScriptedScorer("stupid"))
QUERY = "When does the library open?"
HELLO = [ChatMessage(QUERY)]
STREAMING = [
    mode
    for mode in ResponseMode
    if mode
    not in (
        ResponseMode.ACCUMULATE,
        ResponseMode.COMPACT_ACCUMULATE,
        ResponseMode.NO_TEXT,
        ResponseMode.CONTEXT_ONLY,
    )
]
pytestmark = [  # of LlamaIndex's own
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:is_running called from within a step:DeprecationWarning"),
]


class Opening(BaseModel):
    hour: int


def index_of(engine: ScriptedDetoxiGen, *texts: str) -> VectorStoreIndex:
    Settings.llm = DetoxiGenLLM(detoxigen=engine)
    Settings.tokenizer = Settings.llm.encode
    documents = [Document(text=text) for text in texts or ("The library opens at nine.",)]
    return VectorStoreIndex.from_documents(documents, embed_model=BagEmbedding())


def held_by(engine: ScriptedDetoxiGen, seed: int = 7) -> None:
    assert engine.calls
    assert {(params.guard, params.seed) for *_, params in engine.calls} == {(POLICY, seed)}


def read_fresh(stream: Iterator[Any]) -> list[Any]:
    """Each step in an empty context and a thread of its own, as web servers step a generator."""
    out, done = [], object()
    with ThreadPoolExecutor(2) as pool:
        while (item := pool.submit(contextvars.Context().run, next, stream, done).result()) is not done:
            out.append(item)
    return out


async def aread_fresh(stream: AsyncIterator[Any]) -> list[Any]:
    out, done = [], object()
    while (
        item := await asyncio.create_task(anext(stream, done), context=contextvars.Context())  # type: ignore[arg-type]
    ) is not done:
        out.append(item)
    return out


# -- streams of query engines


@pytest.mark.parametrize("hook", [False, True], ids=["plain", "hook"])
@pytest.mark.parametrize("fresh", [False, True], ids=["read here", "read in fresh contexts"])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("mode", STREAMING)
async def test_a_streamed_answer_belongs_to_its_block(
    mode: ResponseMode, is_async: bool, fresh: bool, hook: bool
) -> None:
    model = scripted()
    index = index_of(model, "one " * 20, "two " * 20)
    options: dict[str, Any] = {"streaming": True, "response_mode": mode}
    if hook:
        options = {"response_synthesizer": get_detox_response_synthesizer(Settings.llm, **options), **options}
    query_engine = index.as_query_engine(**options)
    with detox_options(guard=POLICY, seed=7) as replies:
        response = await query_engine.aquery(QUERY) if is_async else query_engine.query(QUERY)
    if is_async:
        stream = response.async_response_gen() if not fresh else response.response_gen
        pieces = await aread_fresh(stream) if fresh else [piece async for piece in stream]
    else:
        pieces = read_fresh(response.response_gen) if fresh else list(response.response_gen)
    assert "".join(pieces) == CLEAN
    held_by(model)
    assert len(replies) == len(model.calls)


def test_blocks_around_the_reading_are_not_its_own() -> None:
    model = scripted()
    query_engine = index_of(model).as_query_engine(streaming=True)
    with detox_options(guard=POLICY, seed=7):
        first = query_engine.query(QUERY)
    with detox_options(seed=8) as others:
        second = query_engine.query(QUERY)
        list(first.response_gen)
        assert not others
    list(second.response_gen)
    assert [(params.guard, params.seed) for *_, params in model.calls] == [(POLICY, 7), (None, 8)]
    assert len(others) == 1


def test_a_stream_that_is_left_is_closed() -> None:
    model = scripted()
    query_engine = index_of(model).as_query_engine(streaming=True)
    with detox_options(seed=7):
        response = query_engine.query(QUERY)
    next(response.response_gen)
    assert model.active == 1
    response.response_gen.close()
    assert model.active == 0


async def test_streams_of_chat_engines() -> None:
    model = scripted()
    index = index_of(model)
    simple = SimpleChatEngine.from_defaults(memory=memory())
    condense = CondenseQuestionChatEngine.from_defaults(query_engine=index.as_query_engine(), memory=memory())
    for chat in (simple, condense):
        with detox_options(guard=POLICY, seed=7):
            response = chat.stream_chat(QUERY)
        assert "".join(response.response_gen) == CLEAN
        with detox_options(guard=POLICY, seed=7):
            response = await chat.astream_chat(QUERY)
        assert "".join([piece async for piece in response.async_response_gen()]) == CLEAN
    held_by(model)


# -- streams and coroutines of the LLM


@pytest.mark.parametrize("fresh", [False, True], ids=["read here", "read in fresh contexts"])
async def test_streams_of_the_llm(fresh: bool) -> None:
    model = scripted(lambda *_: '{"hour": 9}')
    llm = DetoxiGenLLM(detoxigen=model)
    structured = llm.as_structured_llm(Opening)
    prompt = PromptTemplate("When?")
    with detox_options(guard=POLICY, seed=7):
        streams = [
            llm.stream_chat(HELLO),
            llm.stream_complete(QUERY),
            llm.stream(prompt),
            llm.stream_structured_predict(Opening, prompt),
            structured.stream_chat(HELLO),
        ]
        astreams = [
            await llm.astream_chat(HELLO),
            await llm.astream_complete(QUERY),
            await llm.astream(prompt),
            await llm.astream_structured_predict(Opening, prompt),
            await structured.astream_chat(HELLO),
        ]
    for stream in streams:
        assert read_fresh(stream) if fresh else list(stream)
    for astream in astreams:
        assert await aread_fresh(astream) if fresh else [one async for one in astream]
    assert len(model.calls) == 10
    held_by(model)


async def test_coroutines_made_in_a_block_and_awaited_behind_it() -> None:
    model = scripted(lambda *_: '{"hour": 9}')
    llm = DetoxiGenLLM(detoxigen=model)
    prompt, hook = PromptTemplate("When?"), get_detox_response_synthesizer(llm, policy=POLICY)
    with detox_options(guard=POLICY, seed=7):
        made = [
            llm.achat(HELLO),
            llm.acomplete(QUERY),
            llm.apredict(prompt),
            llm.astructured_predict(Opening, prompt),
            llm.as_structured_llm(Opening).achat(HELLO),
            llm.achat_with_tools([], QUERY),
            hook.asynthesize(QUERY, nodes("a")),
            hook.aget_response(QUERY, ["a"]),
        ]
    await asyncio.gather(*made)
    assert len(model.calls) == len(made)
    held_by(model)


async def test_coroutines_of_engines_made_in_a_block_and_awaited_behind_it() -> None:
    model = scripted()
    index = index_of(model)
    query_engine = index.as_query_engine(streaming=True)

    def ask() -> Any:
        with detox_options(guard=POLICY, seed=7):
            return query_engine.aquery(QUERY)

    response = await ask()
    assert "".join([piece async for piece in response.async_response_gen()]) == CLEAN
    for mode in ("context", "condense_plus_context", "condense_question", "simple"):
        chat = index.as_chat_engine(chat_mode=mode, memory=memory())
        with detox_options(guard=POLICY, seed=7):
            whole, streamed = chat.achat(QUERY), chat.astream_chat(QUERY)
        assert str(await whole) == CLEAN
        pieces = [piece async for piece in (await streamed).async_response_gen()]
        assert "".join(pieces) == CLEAN
    held_by(model)
    assert len(model.calls) >= 9
    await query_engine.aquery(QUERY)


async def test_a_task_made_in_a_block_is_in_it() -> None:
    model = scripted()
    query_engine = index_of(model).as_query_engine(streaming=True)
    with detox_options(guard=POLICY, seed=7):
        task = asyncio.create_task(query_engine.aquery(QUERY))
    response = await task
    assert "".join([piece async for piece in response.async_response_gen()]) == CLEAN
    held_by(model)


async def test_threads_that_copy_the_context_are_in_the_block() -> None:
    model = scripted()
    llm = DetoxiGenLLM(detoxigen=model)
    with detox_options(guard=POLICY, seed=7):
        await asyncio.to_thread(llm.chat, HELLO)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(contextvars.copy_context().run, llm.chat, HELLO).result()
    held_by(model)


async def test_an_agent_run_in_a_block_is_in_it() -> None:
    model = scripted(['<tool_call>\n{"name": "opening", "arguments": {}}\n</tool_call>', "At nine."])

    def opening() -> str:
        """When it opens."""
        return "nine"

    agent = FunctionAgent(tools=[FunctionTool.from_defaults(opening)], llm=DetoxiGenLLM(detoxigen=model))
    with detox_options(guard=POLICY, seed=7):
        run = agent.run(QUERY, memory=memory())
    assert str(await run) == "At nine."
    assert len(model.calls) == 2
    held_by(model)


def test_what_is_written_on_the_way_is_under_the_options_too() -> None:
    model = scripted()
    index = index_of(model)
    with detox_options(guard=POLICY, seed=7):
        TransformQueryEngine(index.as_query_engine(), HyDEQueryTransform()).query(QUERY)
    assert len(model.calls) == 2
    held_by(model)


# -- blocks in generators


def answers(llm: DetoxiGenLLM, count: int = 2) -> Iterator[str]:
    with detox_options(guard=POLICY, seed=7):
        for _ in range(count):
            yield llm.complete(QUERY).text


async def aanswers(llm: DetoxiGenLLM, count: int = 2) -> AsyncIterator[str]:
    with detox_options(guard=POLICY, seed=7):
        for _ in range(count):
            yield (await llm.acomplete(QUERY)).text


async def test_a_block_in_a_generator_holds_in_whatever_context_it_is_stepped() -> None:
    model = scripted()
    llm = DetoxiGenLLM(detoxigen=model)
    assert read_fresh(answers(llm)) == [CLEAN] * 2
    assert await aread_fresh(aanswers(llm)) == [CLEAN] * 2
    assert len(model.calls) == 4
    held_by(model)


async def test_a_query_engine_in_a_generator_is_stepped_too() -> None:
    model = scripted()
    query_engine = index_of(model).as_query_engine(streaming=True)

    def events() -> Iterator[str]:
        with detox_options(guard=POLICY, seed=7):
            for _ in range(2):
                yield from query_engine.query(QUERY).response_gen

    async def aevents() -> AsyncIterator[str]:
        with detox_options(guard=POLICY, seed=7):
            for _ in range(2):
                async for piece in (await query_engine.aquery(QUERY)).response_gen:
                    yield piece

    assert "".join(read_fresh(events())) == CLEAN * 2
    assert "".join(await aread_fresh(aevents())) == CLEAN * 2
    assert len(model.calls) == 4
    held_by(model)


def test_a_block_left_in_another_context_is_out_of_force() -> None:
    model = scripted()
    llm = DetoxiGenLLM(detoxigen=model)
    stream = answers(llm)
    next(stream)
    contextvars.Context().run(stream.close)  # type: ignore[attr-defined]
    llm.complete(QUERY)
    assert model.calls[-1].params.guard is None
    with detox_options(seed=8):
        stream = answers(llm)
        next(stream)
        thread = threading.Thread(target=stream.close)  # type: ignore[attr-defined]
        thread.start()
        thread.join()
        llm.complete(QUERY)
        assert (model.calls[-1].params.guard, model.calls[-1].params.seed) == (None, 8)
    llm.complete(QUERY)
    assert model.calls[-1].params.seed is None


async def test_an_async_generator_that_the_loop_closes_is_out_of_force() -> None:
    model = scripted()
    llm = DetoxiGenLLM(detoxigen=model)
    problems: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context))
    stream = aanswers(llm)
    await anext(stream)
    del stream
    async with asyncio.timeout(10):
        while True:
            await asyncio.sleep(0)
            await llm.acomplete(QUERY)
            if model.calls[-1].params.guard is None:
                break
    assert problems == []


# -- blocks


async def test_nested_blocks_add_up_and_come_off() -> None:
    model = scripted()
    llm = DetoxiGenLLM(detoxigen=model)
    with detox_options(guard=POLICY) as outer:
        with detox_options(seed=7) as inner, contextlib.ExitStack() as stack:
            most = stack.enter_context(detox_options(alpha=1.5))
            await llm.achat(HELLO)
        llm.chat(HELLO)
    llm.chat(HELLO)
    got = [(params.guard, params.seed, params.alpha) for *_, params in model.calls]
    assert got == [(POLICY, 7, 1.5), (POLICY, None, 3.0), (None, None, 3.0)]
    assert (len(outer), len(inner), len(most)) == (2, 1, 1)


def test_a_block_that_fails_is_left() -> None:
    model = scripted()
    with contextlib.suppress(ZeroDivisionError), detox_options(seed=7):
        raise ZeroDivisionError
    DetoxiGenLLM(detoxigen=model).chat(HELLO)
    assert model.calls[0].params.seed is None


def test_one_block_can_be_entered_again() -> None:
    model = scripted()
    llm, block = DetoxiGenLLM(detoxigen=model), detox_options(seed=7)
    for _ in range(2):
        with block as replies:
            llm.chat(HELLO)
        assert len(replies) == 1
    held = [params.seed for *_, params in model.calls]
    assert held == [7, 7]


async def test_tasks_beside_each_other_keep_their_own() -> None:
    model = scripted()
    llm = DetoxiGenLLM(detoxigen=model)

    async def ask(seed: int) -> int:
        with detox_options(seed=seed) as replies:
            await asyncio.sleep(0)
            await llm.achat([ChatMessage(str(seed))])
            return len(replies)

    assert await asyncio.gather(*(ask(seed) for seed in range(20))) == [1] * 20
    assert all(prompt.messages[0]["content"] == str(params.seed) for _, prompt, params in model.calls)


CALL = '<tool_call>\n{"name": "Opening", "arguments": {"hour": 9}}\n</tool_call>'
PROMPT = PromptTemplate("When does {what} open?")


def asked_of(kind: Any, llm: DetoxiGenLLM, **options: Any) -> Any:
    return kind.from_defaults(output_cls=Opening, prompt=PROMPT, llm=llm, **options)


class OwnSynthesizer(Refine):
    """A user's, with a method of its own."""

    async def aget_response(self, *args: Any, **kwargs: Any) -> Any:
        return await super().aget_response(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:asyncio_module:DeprecationWarning")  # the batch runner's own
@pytest.mark.parametrize(
    ("reply", "make"),
    [
        (CLEAN, lambda llm: TreeSummarize(llm=llm).aget_response(QUERY, ["One."])),
        (CLEAN, lambda llm: Refine(llm=llm).aget_response(QUERY, ["One.", "Two."])),
        (CLEAN, lambda llm: Refine(llm=llm, streaming=True).aget_response(QUERY, ["One.", "Two."])),
        (CLEAN, lambda llm: OwnSynthesizer(llm=llm).aget_response(QUERY, ["One."])),
        (CLEAN, lambda llm: FaithfulnessEvaluator(llm=llm).aevaluate(QUERY, "At nine.", ["It opens at nine."])),
        (CLEAN, lambda llm: SummaryExtractor(llm=llm, show_progress=False).aextract([nodes("One.")[0].node])),
        (
            CLEAN,
            lambda llm: BatchEvalRunner({"faithful": FaithfulnessEvaluator(llm=llm)}).aevaluate_response_strs(
                [QUERY], ["At nine."], [["It opens at nine."]]
            ),
        ),
        (
            CLEAN,
            lambda llm: IngestionPipeline(
                transformations=[SummaryExtractor(llm=llm, show_progress=False)], disable_cache=True
            ).arun(nodes=[nodes("One.")[0].node]),
        ),
        ('{"hour": 9}', lambda llm: asked_of(LLMTextCompletionProgram, llm).acall(what="it")),
        ('{"hour": 9}', lambda llm: asked_of(LLMTextCompletionProgram, llm).astream_call(what="it")),
        (CALL, lambda llm: asked_of(FunctionCallingProgram, llm).acall(what="it")),
        (CALL, lambda llm: asked_of(FunctionCallingProgram, llm).astream_call(what="it")),
    ],
)
def test_a_coroutine_of_a_subclass_has_the_options_it_was_made_under(reply: str, make: Any) -> None:
    model = scripted([reply])
    llm = DetoxiGenLLM(detoxigen=model)

    async def awaited() -> None:
        with detox_options(seed=7, guard=POLICY):
            coroutine = make(llm)
        answer = await coroutine
        if hasattr(answer, "__aiter__"):
            await aread_fresh(answer)

    asyncio.run(awaited())
    held_by(model)


def test_the_coroutine_of_a_query_engines_synthesis_has_the_options_it_was_made_under() -> None:
    model = scripted()
    queries = index_of(model).as_query_engine()

    async def awaited() -> None:
        with detox_options(seed=7, guard=POLICY):
            coroutine = queries.asynthesize(QueryBundle(QUERY), nodes("One."))
        await coroutine

    asyncio.run(awaited())
    held_by(model)


@pytest.mark.parametrize(
    ("reply", "make"),
    [
        (CLEAN, lambda llm: Refine(llm=llm, streaming=True).get_response(QUERY, ["One.", "Two."])),
        (CLEAN, lambda llm: CompactAndRefine(llm=llm, streaming=True).get_response(QUERY, ["One.", "Two."])),
        ('{"hour": 9}', lambda llm: asked_of(LLMTextCompletionProgram, llm).stream_call(what="it")),
        (CALL, lambda llm: asked_of(FunctionCallingProgram, llm).stream_call(what="it")),
    ],
)
def test_a_stream_that_asks_as_it_is_read_has_the_options_it_was_made_under(reply: str, make: Any) -> None:
    model = scripted([reply])
    with detox_options(seed=7, guard=POLICY):
        stream = make(DetoxiGenLLM(detoxigen=model))
    read_fresh(stream)
    held_by(model)


def test_outside_a_block_a_synthesizer_has_no_options_of_an_earlier_one() -> None:
    model = scripted()
    with detox_options(seed=7):
        pass
    list(Refine(llm=DetoxiGenLLM(detoxigen=model), streaming=True).get_response(QUERY, ["One.", "Two."]))
    assert {params.seed for *_, params in model.calls} == {None}
