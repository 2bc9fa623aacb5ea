"""Asking many: in the order of completion, in order, cancelled, and more than the queue takes."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest
from fixtures import PARAMS
from harness import random_detoxifier
from tiny import make_tiny_backbone
from waiting import await_until, wait_until

from detox_guard import (
    DecodingParams,
    DetoxiGen,
    EngineBusyError,
    EngineConfig,
    InvalidParamsError,
    PromptError,
    SteeringStream,
)

if TYPE_CHECKING:
    from detox_guard import Chunk


def test_a_batch_keeps_order_and_isolates_errors(model: DetoxiGen) -> None:
    mixed = ["Hello there", "", "x"]
    results = model.batch(mixed, return_exceptions=True)
    assert isinstance(results[1], PromptError)
    assert [getattr(r, "text", None) for r in results] == [
        model.generate("Hello there").text,
        None,
        model.generate("x").text,
    ]
    with pytest.raises(PromptError):
        model.batch(mixed)
    with pytest.raises(InvalidParamsError, match="one for each of 3 prompts"):
        model.batch(mixed, [PARAMS])
    own = model.batch(["x", "x"], [PARAMS, PARAMS.replace(max_new_tokens=3, ignore_eos=True)])
    assert own[1].usage.completion_tokens == 3
    assert model.batch([]) == []


@pytest.mark.parametrize("when_full", ["wait", "refuse"])
def test_a_batch_larger_than_the_queue_waits_instead_of_failing(when_full: Any) -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    streams = [SteeringStream(random_detoxifier(backbone))]
    config = EngineConfig(max_rows=4, max_queue=2, when_full=when_full)
    with DetoxiGen(backbone, streams, config=config) as model:
        results = model.batch(["x"] * 30, max_of(5))
        assert len({r.text for r in results}) == 1


def test_a_batch_that_finds_the_queue_full_of_others_fails_by_name() -> None:
    with DetoxiGen(
        make_tiny_backbone("llama"), config=EngineConfig(max_rows=2, max_queue=1, when_full="refuse")
    ) as model:
        long = DecodingParams(alpha=0.0, max_new_tokens=400, ignore_eos=True, seed=1)
        others = [model.stream("x", long) for _ in range(3)]
        for stream in others[:2]:
            next(stream)
        waiting = threading.Thread(target=lambda: next(others[2]))
        waiting.start()
        wait_until(lambda: model.stats().queued == 1)
        assert [type(r) for r in model.batch(["x", "x"], long, return_exceptions=True)] == [EngineBusyError] * 2
        with pytest.raises(EngineBusyError):
            model.batch(["x"], long)
        others[0].close()
        waiting.join(10)
        assert not waiting.is_alive()


async def test_cancelling_a_batch_frees_its_seats(model: DetoxiGen) -> None:
    params = DecodingParams(max_new_tokens=400, ignore_eos=True, seed=1)
    for return_exceptions in (False, True):
        task = asyncio.create_task(model.abatch(["x"] * 100, params, return_exceptions=return_exceptions))
        await await_until(lambda: model.stats().seats)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await await_until(lambda: not (model.stats().seats or model.stats().queued))
    assert model.stats().finished == 0


def max_of(tokens: int) -> DecodingParams:
    return DecodingParams(max_new_tokens=tokens, seed=3, ignore_eos=True)


def test_each_reply_comes_as_soon_as_it_is_whole_with_its_index(model: DetoxiGen) -> None:
    lengths = [60, 2, 20]
    params = [max_of(tokens) for tokens in lengths]
    pieces: dict[int, str] = {}

    def hear(index: int, chunk: Chunk) -> None:
        pieces[index] = pieces.get(index, "") + chunk.text

    done = list(model.as_completed(["x"] * 3, params, on_chunk=hear))
    assert [index for index, _ in done] == [1, 2, 0]
    for index, reply in done:
        assert reply.usage.completion_tokens == lengths[index]
        assert reply.text == pieces[index] == model.generate("x", params[index]).text


async def test_tasks_get_the_same(model: DetoxiGen) -> None:
    prompts, params = ["x", "", "y"], [max_of(9), max_of(2), max_of(5)]
    wanted = {
        index: getattr(one, "text", None)
        for index, one in enumerate(model.batch(prompts, params, return_exceptions=True))
    }
    heard: list[int] = []
    done = {
        index: getattr(one, "text", None)
        async for index, one in model.aas_completed(
            prompts, params, return_exceptions=True, on_chunk=lambda index, _: heard.append(index)
        )
    }
    assert done == wanted
    assert set(heard) == {0, 2}
    with pytest.raises(PromptError):
        _ = [one async for one in model.aas_completed(prompts, params)]


def test_leaving_the_loop_and_the_first_error_cancel_the_rest(model: DetoxiGen) -> None:
    long = DecodingParams(max_new_tokens=400, ignore_eos=True, seed=1)
    for _ in model.as_completed(["x"] * 6, [max_of(2), *[long] * 5]):
        break
    wait_until(lambda: model.stats().seats == 0)
    with pytest.raises(PromptError):
        list(model.as_completed(["x", "x", ""], long))
    wait_until(lambda: model.stats().seats == 0)
    assert model.stats().finished == 1


def test_what_is_no_list_is_refused_at_the_call(model: DetoxiGen) -> None:
    with pytest.raises(InvalidParamsError, match="a list of prompts"):
        model.as_completed("x")
    with pytest.raises(InvalidParamsError, match="one for each of 2 prompts"):
        model.aas_completed(["x", "y"], [PARAMS])
