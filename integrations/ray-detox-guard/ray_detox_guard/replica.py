"""A replica: one engine, or with `multiplexed` a few, asked through a handle of Ray Serve. Knows models and Serve's
multiplexing; knows no HTTP."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from detox_guard import DetoxGuardError, EngineClosedError
from detox_guard.server import load_model
from ray import serve

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping

    from detox_guard import Chunk, DecodingParams, DetoxiGen, GuardPolicy
    from detox_guard.server import ModelConfig

__all__ = ["make_replica"]

_GATHER_S = 0.02
"""Pieces of a reply that come within this time travel together: a message between processes costs more than a token."""


def make_replica(multiplexed: int | None) -> type[Any]:
    """The class of a deployment. `multiplexed`: most models that a replica holds at once; None is its only one."""

    class Replica:
        """Answers with the pieces of a reply. A replica that cannot load its model, or its detoxifier, never starts."""

        def __init__(self, models: Mapping[str, ModelConfig], guard: GuardPolicy | None) -> None:
            """Raises as `load_model`; Serve tells it as the reason why the replica did not start."""
            self._models, self._guard = dict(models), guard
            self._own: DetoxiGen | None = None
            self._loaded: WeakSet[DetoxiGen] = WeakSet()
            if multiplexed is None:
                ((_, one),) = self._models.items()
                self._own = self._load(one)

        @serve.multiplexed(max_num_models_per_replica=multiplexed or 1)  # type: ignore[untyped-decorator]
        async def held(self, name: str) -> DetoxiGen:
            """One of several models, loaded when it is first asked for."""
            return await asyncio.to_thread(self._load, self._models[name])

        async def facts(self, name: str) -> dict[str, Any]:
            """What `/v1/models` tells of a model."""
            model = await self._model(name)
            return {
                "model_id": model.model_id,
                "detoxifier_ids": model.detoxifier_ids,
                "context_window": model.context_window,
                "has_chat_template": model.has_chat_template,
                "supports_tools": model.supports_tools,
            }

        async def astream(
            self, name: str, prompt: Any, params: DecodingParams, whole: bool = False
        ) -> AsyncGenerator[list[Chunk | DetoxGuardError], None]:
            """The pieces of a reply, as `DetoxiGen.astream` gives them: a few at a time, or `whole`. What that raises
            is the last piece: an error that is raised here Serve writes to its log, with a client's words in it.
            """
            try:
                model = await self._model(name)
                seconds = None if whole else _GATHER_S
                async with (
                    aclosing(model.astream(prompt, params)) as chunks,
                    aclosing(gathered(chunks, seconds)) as batches,
                ):
                    async for batch in batches:
                        yield [*batch]
            except DetoxGuardError as error:
                yield [error]

        def check_health(self) -> None:
            """Serve's own: a replica whose engine ended is exchanged for a new one."""
            if any(model.closed for model in self._loaded):
                raise EngineClosedError("an engine of this replica ended")

        def _load(self, one: ModelConfig) -> DetoxiGen:
            model = load_model(one, self._guard)
            self._loaded.add(model)
            return model

        async def _model(self, name: str) -> DetoxiGen:
            return await self.held(name) if self._own is None else self._own

    return Replica


async def gathered(
    chunks: AsyncIterator[Chunk], seconds: float | None = _GATHER_S
) -> AsyncGenerator[list[Chunk], None]:
    """Chunks in lists: each list is what came within `seconds` (None: all of them). An error comes last."""
    inbox: asyncio.Queue[Chunk | Exception | None] = asyncio.Queue()

    async def read() -> None:
        try:
            async for chunk in chunks:
                inbox.put_nowait(chunk)
        except Exception as error:
            inbox.put_nowait(error)
        else:
            inbox.put_nowait(None)

    reading = asyncio.create_task(read())
    try:
        while True:
            came: list[Any] = [await inbox.get()]
            if not reading.done():
                await asyncio.wait({reading}, timeout=seconds)
            while not inbox.empty():
                came.append(inbox.get_nowait())
            end = came[-1]
            over = end is None or isinstance(end, Exception)
            if batch := came[:-1] if over else came:
                yield batch
            if isinstance(end, Exception):
                raise end
            if over:
                return
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
