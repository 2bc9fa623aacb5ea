"""Batches of threads: whoever gives up frees their seats."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from detox_guard import StepError
from detox_guard.testing import ScriptedDetoxiGen
from langchain_core.runnables import RunnableLambda

from langchain_detox_guard import ChatDetoxiGen, DetoxiGenLLM

if TYPE_CHECKING:
    from collections.abc import Iterator

LONG = "word " * 100_000


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """A process that a shell started in the background has Ctrl-C ignored, and its children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def interrupt_at(active: int, detoxigen: ScriptedDetoxiGen) -> Iterator[None]:
    """Ctrl-C as soon as so many are under way; and again, should Python swallow it (in a weak reference's callback)."""
    over = threading.Event()

    def press() -> None:
        detoxigen.wait_for(active)
        while not over.is_set():
            os.kill(os.getpid(), signal.SIGINT)
            over.wait(5)

    thread = threading.Thread(target=press)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("around", ["model", "chain", "retry", "bound", "completed", "queued", "streamed"])
@pytest.mark.parametrize("kind", [ChatDetoxiGen, DetoxiGenLLM])
def test_an_interrupt_ends_a_batch_and_frees_its_seats(kind: Any, around: str) -> None:
    detoxigen = ScriptedDetoxiGen()
    llm = kind(detoxigen=detoxigen, streaming=around == "streamed")
    runnable = {
        "chain": RunnableLambda(str) | llm, "retry": llm.with_retry(), "bound": llm.bind(alpha=1.0),
    }.get(around, llm)  # fmt: skip
    config: Any = {"max_concurrency": 2} if around == "queued" else None
    # LangChain's own chains and retries hand an interrupt back as a result, if they are to return exceptions.
    apart = around not in ("chain", "retry")

    def ask() -> None:
        if around == "completed":
            list(runnable.batch_as_completed(["a", "b", "c"]))
        else:
            runnable.batch(["a", "b", "c"], config, return_exceptions=apart)

    with detoxigen.hold(), interrupt_at(2 if around == "queued" else 3, detoxigen), pytest.raises(KeyboardInterrupt):
        ask()
    assert detoxigen.active == 0
    assert len(detoxigen.calls) <= 3


def test_the_first_error_ends_the_rest() -> None:
    detoxigen = ScriptedDetoxiGen(lambda prompt, _: StepError("broken") if "break" in str(prompt) else LONG, together=3)
    with pytest.raises(StepError):
        ChatDetoxiGen(detoxigen=detoxigen, max_tokens=100_000).batch(["a", "break", "c"])
    assert (detoxigen.active, detoxigen.abandoned) == (0, 3)


def test_leaving_the_loop_ends_the_rest() -> None:
    detoxigen = ScriptedDetoxiGen(lambda prompt, _: "Done." if "short" in str(prompt) else LONG, together=2)
    for place, reply in ChatDetoxiGen(detoxigen=detoxigen, max_tokens=100_000).batch_as_completed(["a", "short"]):
        assert (place, reply.content) == (1, "Done.")
        break
    detoxigen.wait_for(0)
    assert detoxigen.abandoned == 1


def test_order_errors_and_concurrency_are_langchains(detoxigen: ScriptedDetoxiGen) -> None:
    chat = ChatDetoxiGen(detoxigen=detoxigen, seed=1)
    replies = chat.batch(["one", "break", "three"], return_exceptions=True)
    assert [type(reply).__name__ for reply in replies] == ["AIMessage", "StepError", "AIMessage"]
    assert "three" in str(replies[2].content)
    assert chat.batch([]) == []
    assert sorted(place for place, _ in chat.batch_as_completed(["a", "b"])) == [0, 1]
    assert [reply.content for reply in chat.batch(["one", "three"])] == [replies[0].content, replies[2].content]


def test_a_thread_that_outlives_its_batch_may_ask(detoxigen: ScriptedDetoxiGen) -> None:
    """Its context is still the batch's."""
    chat = ChatDetoxiGen(detoxigen=detoxigen, seed=1)
    late: list[Any] = []
    go = threading.Event()

    def spawn(value: Any) -> Any:
        import contextvars

        context = contextvars.copy_context()
        thread = threading.Thread(target=lambda: (go.wait(), late.append(context.run(chat.invoke, "late"))))
        thread.start()
        late_threads.append(thread)
        return value

    late_threads: list[threading.Thread] = []

    class Spawning(ChatDetoxiGen):
        def invoke(self, value: Any, *args: Any, **kwargs: Any) -> Any:
            return super().invoke(spawn(value), *args, **kwargs)

    Spawning(detoxigen=detoxigen, seed=1).batch(["a", "b"])
    go.set()
    for thread in late_threads:
        thread.join()
    assert len(late) == 2


async def test_thousands_may_be_gathered() -> None:
    chat = ChatDetoxiGen(detoxigen=ScriptedDetoxiGen(), seed=1, max_tokens=1)
    replies = await asyncio.gather(*(chat.ainvoke(f"Hi {i}") for i in range(2000)))
    assert len(replies) == 2000
