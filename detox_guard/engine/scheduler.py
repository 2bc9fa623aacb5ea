"""The `Engine` over one runner: what may be asked of it, and by whom. Knows limits and the queue's places; leaves the
rows to the loop."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from detox_guard.engine.base import EngineLimits
from detox_guard.engine.loop import Loop
from detox_guard.errors import EngineBusyError, EngineError, PromptError, PromptTooLongError

if TYPE_CHECKING:
    from collections.abc import Callable

    from detox_guard.engine.base import Bounds, EngineStats, PromptIds, Request
    from detox_guard.engine.runner import Runner

__all__ = ["Scheduler"]


class Scheduler:
    """An `Engine`. Its thread starts at the first request, and ends when nobody holds this object."""

    def __init__(self, runner: Runner, bounds: Bounds) -> None:
        """Raises `EngineError` where the bounds have no room for a single steered request."""
        rows = 1 + len(runner.weights)
        if rows > bounds.max_rows:
            raise EngineError(f"max_rows {bounds.max_rows} cannot seat one request of {rows} rows")
        positions = [bound for bound in (runner.limits.max_positions, bounds.max_slots) if bound is not None]
        self.limits = EngineLimits(
            min(positions, default=None), bounds.max_rows, runner.limits.views, runner.limits.rewinds
        )
        self._bounds = bounds
        self._runner = runner
        # The loop knows nothing of this object, so that an engine nobody holds is closed.
        self._loop = Loop(runner, bounds)
        self._finalizer = weakref.finalize(self, self._loop.close)

    def check(self, prompt: PromptIds, max_new_tokens: int, may_rewind: bool = False) -> None:
        if prompt.steered and not self._runner.weights:
            raise EngineError(
                "alpha > 0 asks for steering, but this engine has no detoxifier", hint="load one, or set alpha=0"
            )
        if may_rewind and not self.limits.rewinds:
            raise EngineError("a guard takes tokens back, which this model cannot", hint="ask without a guard")
        self._check_length(prompt, max_new_tokens)
        vocab = self._runner.limits.vocab_size
        if not prompt.ids:
            raise PromptError("prompt", prompt.ids, "at least one token")
        if not all(0 <= min(ids) <= max(ids) < vocab for ids in (prompt.ids, *prompt.contexts) if ids):
            raise PromptError("prompt", prompt.ids, f"token ids from 0 to {vocab - 1}")

    def _check_length(self, prompt: PromptIds, max_new_tokens: int) -> None:
        asked = self._runner.slots(prompt) + max_new_tokens
        own, most = len(prompt.ids), self.limits.max_positions
        if most is not None and asked > most:
            raise PromptTooLongError(
                "prompt",
                f"{own} prompt + {asked - own - max_new_tokens} virtual + {max_new_tokens} new tokens = {asked}",
                f"at most {most} positions",
                hint="shorten the prompt or lower max_new_tokens",
            )
        room = self._runner.room(prompt, max_new_tokens)
        if room.lanes * room.slots > self._bounds.max_cached_slots:
            raise PromptTooLongError(
                "prompt",
                f"{room.lanes * room.slots} slots of cache",
                f"at most {self._bounds.max_cached_slots} slots",
                hint="shorten the prompt, lower max_new_tokens, or raise EngineConfig.max_cached_slots",
            )

    def submit(self, request: Request, *, placed: bool = False) -> None:
        if not placed:
            self._take()
        try:
            if request.sampling.alpha > 0 and not request.prompt.steered:
                raise EngineError("alpha > 0 asks for steering, but the prompt says that nothing steers")
            self.check(request.prompt, request.max_new_tokens, request.may_rewind)
            self._loop.submit(request)
        except BaseException:
            self.give_back()
            raise

    def take_place(self, check: Callable[[], None] | None = None) -> None:
        if self._bounds.when_full == "refuse":
            self._take()
        else:
            self._loop.places.wait(check)

    async def take_place_async(self) -> None:
        if self._bounds.when_full == "refuse":
            self._take()
        else:
            await self._loop.places.wait_async()

    def give_back(self) -> None:
        self._loop.places.give_back()

    def check_open(self) -> None:
        self._loop.check_open()
        if self._bounds.when_full == "refuse" and self._loop.places.full:
            raise self._busy()

    def check_alive(self) -> None:
        self._loop.check_alive()

    def _take(self) -> None:
        if not self._loop.places.take():
            raise self._busy()

    def _busy(self) -> EngineBusyError:
        most = self._bounds.max_queue
        return EngineBusyError(
            f"queue: {most} requests are waiting, at most {most} may",
            hint="try again later, or raise EngineConfig.max_queue",
        )

    def stats(self) -> EngineStats:
        return self._loop.stats()

    @property
    def is_own_thread(self) -> bool:
        return self._loop.is_own_thread

    @property
    def closed(self) -> bool:
        return self._loop.closed

    def close(self, timeout_s: float = 10.0) -> None:
        self._loop.close(timeout_s)
