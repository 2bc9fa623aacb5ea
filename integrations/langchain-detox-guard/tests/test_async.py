"""Many at once, and whoever gives up frees its seat."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from detox_guard import DetoxiGen
from detox_guard.testing import ScriptedDetoxiGen

from langchain_detox_guard import ChatDetoxiGen, DetoxiGenLLM
from langchain_scripts import BOTH, obliging


@BOTH
async def test_the_loop_stays_free(kind: Any) -> None:
    """While all of them decode: a loop that waited with them would never end the hold."""
    detoxigen = ScriptedDetoxiGen()
    llm = kind(detoxigen=detoxigen)
    with detoxigen.hold():
        asked = [*(llm.ainvoke("Hi") for _ in range(8)), *(llm.abatch(["a", "b"]) for _ in range(2))]
        replies = asyncio.gather(*asked)
        await asyncio.to_thread(detoxigen.wait_for, 12)
    assert len(await replies) == 10


@BOTH
async def test_loading_happens_off_the_loop(
    kind: Any, monkeypatch: pytest.MonkeyPatch, detoxigen: ScriptedDetoxiGen
) -> None:
    loading, loaded = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def shared(*_: Any, **__: Any) -> ScriptedDetoxiGen:
        loop.call_soon_threadsafe(loading.set)
        assert loaded.wait(30)
        return detoxigen

    monkeypatch.setattr(DetoxiGen, "shared", shared)
    task = asyncio.create_task(kind().ainvoke("Hi"))
    await loading.wait()
    loaded.set()
    assert await task


@BOTH
@pytest.mark.parametrize("way", ["ainvoke", "astream", "abatch"])
async def test_a_cancelled_task_frees_its_seat(kind: Any, way: str) -> None:
    detoxigen = ScriptedDetoxiGen(obliging)
    llm = kind(detoxigen=detoxigen)

    async def run() -> None:
        if way == "astream":
            _ = [piece async for piece in llm.astream("Hi")]
        elif way == "abatch":
            await llm.abatch(["a", "b"])
        else:
            await llm.ainvoke("Hi")

    seats = 2 if way == "abatch" else 1
    with detoxigen.hold():
        task = asyncio.create_task(run())
        await asyncio.to_thread(detoxigen.wait_for, seats)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(detoxigen.wait_for, 0)
    assert detoxigen.abandoned == seats


def test_an_abandoned_stream_frees_its_seat(llm: DetoxiGenLLM, detoxigen: ScriptedDetoxiGen) -> None:
    stream = llm.stream("Hi")
    next(stream)
    assert detoxigen.active == 1
    stream.close()  # type: ignore[attr-defined]
    assert (detoxigen.active, detoxigen.abandoned) == (0, 1)


@pytest.mark.parametrize(
    ("kind", "return_exceptions"), [(ChatDetoxiGen, False), (ChatDetoxiGen, True), (DetoxiGenLLM, True)]
)
async def test_a_long_abatch_does_not_flood_the_queue(kind: Any, return_exceptions: bool) -> None:
    """Where LangChain asks one by one. `DetoxiGenLLM` leaves the rest to `DetoxiGen.abatch`, which heeds its queue."""
    detoxigen = ScriptedDetoxiGen(together=256)
    replies = await kind(detoxigen=detoxigen).abatch(["a"] * 300, return_exceptions=return_exceptions)
    assert len(replies) == 300
    assert detoxigen.most_active == 256
