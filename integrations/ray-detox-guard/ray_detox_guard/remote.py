"""A model whose engines are elsewhere: what the server asks of a model, asked of replicas. Knows handles and what
Ray's errors mean; knows no HTTP.

A reply's seed is drawn here. So a replica that is lost costs nothing but time: the next one decodes the same text, and
what was given out already is skipped. Where it is another text (in bfloat16 the rows beside a reply can change it), a
stream ends with `ReplicaLostError`. A reply that nobody saw yet is begun anew.
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import aclosing
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from detox_guard import Chunk, DetoxGuardError, EngineBusyError, EngineClosedError, EngineError
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from ray_detox_guard.errors import ReplicaLostError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from detox_guard import DecodingParams, GuardPolicy, TokenTrace
    from ray.serve.handle import DeploymentHandle

__all__ = ["RemoteModel"]

_PAUSE_S = 0.1
"""Before the first try on another replica; then twice as long."""


class RemoteModel:
    """A model of the server, by its name. `params` are the defaults of its requests."""

    def __init__(
        self, name: str, handle: DeploymentHandle, params: DecodingParams, *, guard: GuardPolicy | None, retries: int
    ) -> None:
        """`guard` is the server's own, with its scorer as a name."""
        self._name, self._handle, self._guard, self._retries = name, handle, guard, retries
        self.params = params
        self._facts: dict[str, Any] = {}

    # -- what the server tells of a model

    @property
    def model_id(self) -> str:
        """The backbone's name, once a replica told it."""
        return str(self._facts.get("model_id", self._name))

    @property
    def detoxifier_ids(self) -> tuple[str, ...]:
        """As `DetoxiGen`'s."""
        return tuple(self._facts.get("detoxifier_ids", ()))

    @property
    def context_window(self) -> int | None:
        """As `DetoxiGen`'s; None before a replica told it."""
        return self._facts.get("context_window")

    @property
    def has_chat_template(self) -> bool:
        """As `DetoxiGen`'s."""
        return bool(self._facts.get("has_chat_template", True))

    @property
    def supports_tools(self) -> bool:
        """As `DetoxiGen`'s."""
        return bool(self._facts.get("supports_tools", False))

    @property
    def closed(self) -> bool:
        """Never: Serve starts lost replicas again."""
        return False

    def close(self) -> None:
        """Serve ends the replicas."""

    async def learn(self) -> None:
        """Ask a replica for what it is; waits until there is one. Raises `EngineError`."""
        try:
            self._facts = await self._handle.facts.remote(self._name)
        except (RayError, RayServeException) as error:
            raise _ours(error) from error

    # -- replies

    async def astream(
        self, prompt: Any, params: DecodingParams | None = None, **changes: Any
    ) -> AsyncGenerator[Chunk, None]:
        """As `DetoxiGen.astream`. Raises `ReplicaLostError`, `EngineBusyError`, and what the replica raises."""
        async with aclosing(self._tried(prompt, (params or self.params).replace(**changes))) as chunks:
            async for chunk in chunks:
                yield chunk

    @property
    def unstreamed(self) -> _Unstreamed:
        """This model for replies that nobody sees before they are whole: no text that was lost binds the next try."""
        return _Unstreamed(self._tried)

    async def _tried(self, prompt: Any, params: DecodingParams, *, whole: bool = False) -> AsyncGenerator[Chunk, None]:
        params, given = self._portable(params), ""
        for attempt in range(self._retries + 1):
            if attempt:
                await asyncio.sleep(_PAUSE_S * 2 ** (attempt - 1))
            try:
                if not self._facts:
                    await self.learn()
                async with aclosing(_after(given, self._once(prompt, params, whole))) as chunks:
                    if whole:
                        came = [chunk async for chunk in chunks]
                        told = tuple(token for chunk in came for token in chunk.tokens)
                        yield Chunk("".join(chunk.text for chunk in came), came[-1].generation, told)
                        return
                    async for chunk in chunks:
                        given += chunk.text
                        yield chunk
                return
            except ReplicaLostError:
                raise
            except EngineClosedError as error:
                lost = error
        raise ReplicaLostError(
            f"the replica of {self._name!r} was lost, and so were {self._retries} after it", hint="try again"
        ) from lost

    async def _once(self, prompt: Any, params: DecodingParams, whole: bool) -> AsyncGenerator[Chunk, None]:
        """The reply of one replica. Raises `EngineClosedError` where that was lost."""
        asked = self._handle.options(stream=True).astream.remote(self._name, prompt, params, whole)
        try:
            async for batch in asked:
                for chunk in batch:
                    if isinstance(chunk, DetoxGuardError):
                        raise chunk
                    yield chunk
                    if chunk.generation is not None:
                        return
        except (RayError, RayServeException) as error:
            raise _ours(error) from error
        finally:
            asked.cancel()
        raise EngineClosedError("a replica's reply had no end")

    def _portable(self, params: DecodingParams) -> DecodingParams:
        """With a seed, and with the guard's scorer by its name: an object would stay in this process."""
        guard = params.guard
        if guard is not None and not isinstance(guard.scorer, str) and self._guard is not None:
            params = params.replace(guard=guard.replace(scorer=self._guard.scorer))
        return params.replace(seed=secrets.randbits(63)) if params.seed is None else params


class _Unstreamed:
    """One chunk a reply."""

    def __init__(self, tried: Callable[..., AsyncGenerator[Chunk, None]]) -> None:
        self._tried = tried

    def astream(self, prompt: Any, params: DecodingParams) -> AsyncGenerator[Chunk, None]:
        """The whole reply. Raises as `RemoteModel.astream`."""
        return self._tried(prompt, params, whole=True)


async def _after(given: str, chunks: AsyncGenerator[Chunk, None]) -> AsyncGenerator[Chunk, None]:
    """The chunks behind the text that was given out. Raises `ReplicaLostError` if they do not begin with it."""
    async with aclosing(chunks):
        async for chunk in chunks:
            if not given:
                yield chunk
            elif chunk.text.startswith(given):
                yield Chunk(chunk.text[len(given) :], chunk.generation, _behind(chunk, len(given)))
                given = ""
            elif given.startswith(chunk.text) and chunk.generation is None:
                given = given[len(chunk.text) :]
            else:
                raise ReplicaLostError("the replica was lost, and another one decodes another text", hint="try again")


def _behind(chunk: Chunk, chars: int) -> tuple[TokenTrace, ...]:
    """The tokens of a chunk whose text ends behind so many of its characters."""
    ends = accumulate(len(token.text) for token in chunk.tokens)
    return tuple(token for token, end in zip(chunk.tokens, ends, strict=True) if end > chars)


def _ours(error: Exception) -> DetoxGuardError:
    """What Ray's error means. A path or stack of the replica is in none of them."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, DetoxGuardError):
            return cause
        if not isinstance(cause, RayError | RayServeException):
            return EngineError(f"a replica failed ({type(cause).__name__})")
        error = cause
    if isinstance(error, BackPressureError):
        return EngineBusyError("all replicas are busy and the queue is full", hint="try again soon")
    return EngineClosedError(f"a replica was lost ({type(error).__name__})")
