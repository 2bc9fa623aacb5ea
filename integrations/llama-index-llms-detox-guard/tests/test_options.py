"""Options around a call hold for its whole answer, whoever reads it, wherever and whenever."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from typing import TYPE_CHECKING, Any

import pytest
from llama_index.core import Settings
from llama_index.core.chat_engine import CondenseQuestionChatEngine, SimpleChatEngine
from llama_index.core.llms import ChatMessage
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.llms.detox_guard import DetoxiGenLLM, detox_options, get_detox_response_synthesizer
from llama_index_harness import CLEAN, memory, scripted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
from held import HELLO, aread_fresh, held_by, index_of, read_fresh
from llama_index_harness import POLICY, QUERY

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
