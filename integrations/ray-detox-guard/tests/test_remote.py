"""A model whose engines are elsewhere: a real replica, in this process. The handle raises Ray's errors."""

from __future__ import annotations

import asyncio
import pickle
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import pytest
from detox_guard import (
    Chunk,
    DecodingParams,
    DetoxifierError,
    EngineBusyError,
    EngineError,
    GuardPolicy,
    PromptTooLongError,
    StepError,
    load_scorer,
)
from detox_guard.server import ModelConfig
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from ray_detox_guard import ReplicaLostError
from ray_detox_guard.remote import RemoteModel
from ray_detox_guard.replica import gathered, make_replica
from small import save_tiny

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator
    from pathlib import Path

GUARD = GuardPolicy()


class Handle:
    """Calls a replica as Serve does. `faults`: for each call, what it raises behind its first piece."""

    def __init__(self, replica: Any, faults: list[Exception | None], twist: int = 0) -> None:
        self._replica, self._faults, self._twist = replica, faults, twist
        self.calls: list[DecodingParams] = []
        self.astream, self.facts = self, Facts(replica)

    def options(self, **_: Any) -> Handle:
        return self

    def remote(self, name: str, prompt: Any, params: DecodingParams, whole: bool) -> Call:
        self.calls.append(pickle.loads(pickle.dumps(params)))
        asked = params.replace(seed=(params.seed or 0) + self._twist * (len(self.calls) - 1))
        fault = self._faults.pop(0) if self._faults else None
        return Call(self._replica.astream(name, prompt, asked, whole), fault)


class Facts:
    """What a replica tells of itself."""

    def __init__(self, replica: Any) -> None:
        self._replica = replica

    def remote(self, name: str) -> Any:
        return self._replica.facts(name)


class Call:
    def __init__(self, batches: AsyncGenerator[list[Chunk], None], fault: Exception | None) -> None:
        self._batches, self._fault = batches, fault

    async def __aiter__(self) -> AsyncIterator[list[Chunk]]:
        async with aclosing(self._batches):
            async for batch in self._batches:
                if self._fault is not None:
                    yield batch[:1]
                    raise self._fault
                yield batch

    def cancel(self) -> None:
        pass


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = save_tiny(tmp_path_factory.mktemp("tiny"))
    return make_replica(None)({"tiny": ModelConfig(model=folder, loading={"device": "cpu"})}, GUARD)


def model_of(replica: Any, *faults: Exception | None, twist: int = 0, retries: int = 2) -> tuple[RemoteModel, Handle]:
    handle = Handle(replica, list(faults), twist)
    params = DecodingParams(max_new_tokens=24, ignore_eos=True)
    return RemoteModel("tiny", handle, params, guard=GUARD, retries=retries), handle


async def said(model: RemoteModel, **changes: Any) -> list[Chunk]:
    return [chunk async for chunk in model.astream("The mayor", **changes)]


async def unstreamed(model: RemoteModel, **changes: Any) -> list[Chunk]:
    return [chunk async for chunk in model.unstreamed.astream("The mayor", model.params.replace(**changes))]


async def keep(items: AsyncIterator[Any], into: list[Any]) -> None:
    async for item in items:
        into.append(item)


async def test_a_lost_replica_costs_no_text(replica: Any) -> None:
    whole = await said(model_of(replica)[0], seed=5)
    model, handle = model_of(replica, ActorDiedError(), ActorDiedError())
    again = await said(model, seed=5)
    assert "".join(chunk.text for chunk in again) == "".join(chunk.text for chunk in whole) != ""
    assert again[-1].generation is not None
    assert again[-1].generation.steering.alpha > 0
    assert len(handle.calls) == 3


async def test_a_seed_is_drawn_once_for_all_tries(replica: Any) -> None:
    model, handle = model_of(replica, ActorDiedError())
    text = "".join(chunk.text for chunk in await said(model))
    assert text
    first, second = handle.calls
    assert first.seed == second.seed is not None


async def test_another_text_is_a_named_error_and_no_word_of_it_comes(replica: Any) -> None:
    model, _ = model_of(replica, ActorDiedError(), twist=1)
    came: list[Chunk] = []
    with pytest.raises(ReplicaLostError, match="another text"):
        await keep(model.astream("The mayor", seed=5), came)
    whole = "".join(chunk.text for chunk in await said(model_of(replica)[0], seed=5))
    assert whole.startswith("".join(chunk.text for chunk in came))


async def test_a_reply_that_nobody_saw_may_be_another_one(replica: Any) -> None:
    model, handle = model_of(replica, ActorDiedError(), twist=1)
    (whole,) = await unstreamed(model, seed=5)
    assert whole.text == "".join(chunk.text for chunk in await said(model_of(replica)[0], seed=6)) != ""
    assert whole.generation is not None
    assert len(handle.calls) == 2


async def test_when_all_are_lost_the_end_is_named(replica: Any) -> None:
    model, handle = model_of(replica, *[ActorDiedError()] * 2, retries=1)
    with pytest.raises(ReplicaLostError, match="was lost"):
        await said(model, seed=5)
    assert len(handle.calls) == 2


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (RayTaskError("astream", "Traceback in /a/path", StepError("no numbers")), StepError),
        (RayTaskError("astream", "Traceback in /a/path", ValueError("/a/path")), EngineError),
        (BackPressureError(1, 1), EngineBusyError),
    ],
)
async def test_what_a_replica_raises_comes_as_itself_and_tells_no_path(
    replica: Any, fault: Exception, kind: type[Exception]
) -> None:
    model, handle = model_of(replica, fault)
    with pytest.raises(kind) as raised:
        await said(model)
    assert type(raised.value) is kind
    assert "/a/path" not in str(raised.value)
    assert len(handle.calls) == 1


async def test_a_refusal_is_given_not_raised_so_that_no_log_holds_it(replica: Any) -> None:
    asked = [batch async for batch in replica.astream("tiny", "x " * 9000, DecodingParams())]
    assert [[type(one) for one in batch] for batch in asked] == [[PromptTooLongError]]
    handle = Handle(replica, [])
    with pytest.raises(PromptTooLongError):
        await keep(RemoteModel("tiny", handle, DecodingParams(), guard=GUARD, retries=2).astream("x " * 9000), [])
    assert len(handle.calls) == 1


async def test_a_guard_goes_there_by_the_name_of_its_scorer(replica: Any) -> None:
    model, handle = model_of(replica)
    policy = GUARD.replace(scorer=load_scorer("embedded"), threshold=0.3)
    last = (await said(model, guard=policy))[-1].generation
    assert last is not None
    assert last.guard is not None
    assert handle.calls[0].guard == GUARD.replace(threshold=0.3)


async def test_an_error_comes_behind_what_came_before_it() -> None:
    async def pieces() -> AsyncIterator[Chunk]:
        yield Chunk("a")
        yield Chunk("b")
        await asyncio.sleep(0)
        raise StepError("no numbers")

    came: list[list[Chunk]] = []
    with pytest.raises(StepError):
        await keep(gathered(pieces()), came)
    assert [chunk.text for batch in came for chunk in batch] == ["a", "b"]


def test_a_replica_without_its_detoxifier_does_not_start(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    missing = ModelConfig(model=folder, detoxifier=str(tmp_path / "none"), loading={"device": "cpu"})
    with pytest.raises(DetoxifierError):
        make_replica(None)({"tiny": missing}, None)
