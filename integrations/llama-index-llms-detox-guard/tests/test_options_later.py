"""Options hold for streams and coroutines that are made under them and read or awaited behind them."""

from __future__ import annotations

import asyncio
import contextvars
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from held import HELLO, Opening, aread_fresh, held_by, index_of, read_fresh
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.evaluation import BatchEvalRunner, FaithfulnessEvaluator
from llama_index.core.extractors import SummaryExtractor
from llama_index.core.indices.query.query_transform import HyDEQueryTransform
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.program import FunctionCallingProgram, LLMTextCompletionProgram
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import TransformQueryEngine
from llama_index.core.response_synthesizers import CompactAndRefine, Refine, TreeSummarize
from llama_index.core.schema import QueryBundle
from llama_index.core.tools import FunctionTool
from llama_index.llms.detox_guard import DetoxiGenLLM, detox_options, get_detox_response_synthesizer
from llama_index_harness import CLEAN, POLICY, QUERY, memory, nodes, scripted

pytestmark = [  # of LlamaIndex's own
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:is_running called from within a step:DeprecationWarning"),
]

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
