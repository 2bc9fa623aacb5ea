"""Text that another model writes: nothing unscored is released, however its chunks come."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
from guarding import FOREIGN, Gated, Scripted, with_letter
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import WAIT_S

from detox_guard import Chunk, GuardError, GuardPolicy, InvalidParamsError, ScorerError, aguard_text, guard_text
from detox_guard.scorers.batcher import batcher_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def in_pieces(text: str, size: int = 3) -> Iterator[str]:
    return (text[i : i + size] for i in range(0, len(text), size))


@pytest.mark.parametrize(
    ("on_exhausted", "expected"),
    [("replace", "It rains. [removed] We stay at home. And then"), ("stop", "It rains. ")],
)
def test_foreign_text(on_exhausted: str, expected: str) -> None:
    events: list[Any] = []
    policy = GuardPolicy(scorer=Scripted(with_letter("b")), on_exhausted=on_exhausted, context_chars=0)
    assert "".join(guard_text(in_pieces(FOREIGN), policy, events.append)) == expected
    assert [event.action for event in events] == [on_exhausted]

    async def pieces() -> Any:
        for piece in in_pieces(FOREIGN):
            yield piece

    async def joined() -> str:
        return "".join([text async for text in aguard_text(pieces(), policy)])

    assert asyncio.run(joined()) == expected
    with pytest.raises(GuardError):
        list(guard_text(in_pieces(FOREIGN), policy.replace(on_exhausted="raise")))


@given(st.text(alphabet="abc .!?\n", max_size=80), st.integers(1, 9))
@settings(deadline=None, max_examples=50)
def test_foreign_text_that_is_fit_comes_whole(text: str, size: int) -> None:
    policy = GuardPolicy(scorer=Scripted(lambda text: 0.0))
    assert "".join(guard_text(in_pieces(text, size), policy)) == text


def test_foreign_text_fails_closed() -> None:
    released: list[str] = []
    with pytest.raises(ScorerError):
        released.extend(guard_text(in_pieces(FOREIGN), GuardPolicy(scorer=Scripted(lambda text: float("nan")))))
    silent = Gated()
    with pytest.raises(ScorerError, match="no answer"):
        released.extend(guard_text(in_pieces(FOREIGN), GuardPolicy(scorer=silent, scorer_timeout_s=0.05)))
    silent.gate.set()
    assert released == []


def test_one_who_does_not_wait_for_a_verdict_takes_nobody_elses() -> None:
    scorer = Gated()
    policy = GuardPolicy(scorer=scorer)

    async def pieces() -> Any:
        yield FOREIGN

    async def give_up() -> None:
        async def read() -> list[str]:
            return [text async for text in aguard_text(pieces(), policy)]

        task = asyncio.create_task(read())
        await asyncio.to_thread(scorer.asked.wait, WAIT_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    batcher = batcher_for(scorer)
    asyncio.run(give_up())
    scorer.gate.set()
    assert "".join(guard_text([FOREIGN], policy)) == FOREIGN
    for stream in ({"a": "hi"}, b"hi", 5):
        with pytest.raises(InvalidParamsError, match="chunks"):
            guard_text(stream, policy)  # type: ignore[arg-type]
    assert batcher is batcher_for(scorer)
    late = batcher.submit(["one"])
    given_up = batcher.submit(["two"])
    given_up.cancel()
    assert late.result(5) == batcher.submit(["three"]).result(5) == [0.0]


def test_a_forked_child_is_guarded_too() -> None:
    text, policy = "It rains. We stay at home.", GuardPolicy()
    assert "".join(guard_text([text], policy)) == text
    assert any(thread.name == "detox-guard-scorer" for thread in threading.enumerate())  # it waits for more
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if "".join(guard_text([text], policy.replace(scorer_timeout_s=5.0))) == text else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def held_both_ways(chunks: Sequence[Any], policy: GuardPolicy | None = None) -> list[str]:
    async def pieces() -> Any:
        for chunk in chunks:
            yield chunk

    async def joined() -> str:
        return "".join([text async for text in aguard_text(pieces(), policy)])

    return ["".join(guard_text(iter(chunks), policy)), asyncio.run(joined())]


def test_chunks_of_foreign_streams() -> None:
    class Text(str):
        __slots__ = ()

    assert (
        held_both_ways(["It rains. ", None, Text("We stay"), "", Chunk(" at home."), None])
        == ["It rains. We stay at home."] * 2
    )


@pytest.mark.parametrize("odd", [{"text": "x"}, b"x", 3, ["x"], ("x", "y"), object(), float("nan")])
def test_a_chunk_that_is_no_text_is_named(odd: object) -> None:
    with pytest.raises(InvalidParamsError) as caught:
        held_both_ways(["It rains.", odd])
    assert (caught.value.field, caught.value.value) == ("chunks[1]", odd)


@pytest.mark.parametrize("ask", [guard_text, aguard_text])
def test_what_is_no_stream_or_no_policy_is_refused_at_once(ask: Any) -> None:
    async def pieces() -> Any:
        yield "x"

    stream, other = (["x"], pieces()) if ask is guard_text else (pieces(), ["x"])
    for bad in (None, 3, other):
        with pytest.raises(InvalidParamsError) as caught:
            ask(bad)
        assert caught.value.field == "chunks"
    with pytest.raises(InvalidParamsError) as caught:
        ask(stream, {"threshold": 0.5})
    assert caught.value.field == "policy"


@pytest.mark.parametrize("size", [1, 4, 7, 1000])
def test_held_text_is_cut_alike_however_it_comes(size: int) -> None:
    text = "It rains, and the library in the old town is open " * 20 + "until nine. Bye."
    scorer = Scripted(lambda text: float("bad" in text))
    chunks = [text[i : i + size] for i in range(0, len(text), size)]
    units = list(guard_text(chunks, GuardPolicy(scorer=scorer)))
    assert "".join(units) == text
    assert max(map(len, units)) <= 48 * 4 + size + 20
    assert len(units) >= 5
