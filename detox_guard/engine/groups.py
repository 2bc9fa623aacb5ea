"""Prompts on their way into rows: which are computed together, whose chunk comes next, and how long it is.

Knows prompts and a runner; knows no seats, no tokens of a reply.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from detox_guard.engine.base import shared
from detox_guard.engine.prompt_cache import LEAST_SHARED, PromptCache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from detox_guard.engine.base import Bounds, PromptIds, Request
    from detox_guard.engine.runner import Computed, Prefill, Runner

__all__ = ["Group", "Groups"]

_CHUNK_S = 0.2
"""What a chunk of prefill may take where others wait for it."""
_MIN_CHUNK, _FIRST_CHUNK = 16, 64
"""Columns of a chunk where others wait: the fewest, and how many until it is known how fast this machine is."""


@dataclass(eq=False)
class Group:
    """Requests whose prompts are computed together: they are out of the queue, and not seated yet."""

    requests: list[Request]
    prompts: list[PromptIds]
    """Of the requests that it began with: what is being computed goes on when one of them is cancelled."""
    computed: dict[PromptIds, Computed] = field(default_factory=dict)
    prefill: Prefill | None = None

    @property
    def missing(self) -> list[PromptIds]:
        return [prompt for prompt in self.prompts if prompt not in self.computed]

    @property
    def left(self) -> int:
        """Columns still to compute."""
        if self.prefill is not None:
            return self.prefill.left
        return max((prompt.longest for prompt in self.missing), default=0)


class Groups:
    """The groups in order of arrival, and the prompts that were computed lately."""

    def __init__(self, runner: Runner, bounds: Bounds) -> None:
        self.recent = PromptCache(bounds.prompt_cache_slots)
        self._runner = runner
        self._most = bounds.prefill_chunk
        self._groups: list[Group] = []
        # Columns times rows that a second of prefill computes, as last seen; and whose turn the next chunk is.
        self._pace = 0.0
        self._oldest_next = True

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def requests(self) -> list[Request]:
        return [request for group in self._groups for request in group.requests]

    def add(self, admitted: Iterable[Request]) -> None:
        """Groups of requests that have just been admitted: those whose prompts fit one chunk, and longer ones alone."""
        open_: Group | None = None
        for request in admitted:
            open_ = self._join(request, open_)

    def _join(self, request: Request, open_: Group | None) -> Group:
        """Put a request into a group, and say which one the next request may join. Equal prompts are computed once:
        samples of one prompt, a chat's retry, a question asked again."""
        prompt = request.prompt
        for group in self._groups:
            if prompt in group.prompts:
                group.requests.append(request)
                return open_ or group
        kept = self.recent.get(prompt)
        known = {} if kept is None else {prompt: kept}
        if open_ is not None and open_.prefill is None:
            longest = max(one.longest for one in (*open_.prompts, prompt))
            if longest * (len(open_.prompts) + 1) <= self._most:
                open_.requests.append(request)
                open_.prompts.append(prompt)
                open_.computed.update(known)
                return open_
        self._groups.append(Group([request], [prompt], known))
        return self._groups[-1]

    def next(self) -> list[Group]:
        """Those with nothing to compute, and one whose chunk comes now: the oldest and the shortest by turns. So a
        short prompt is not held up by long ones, and a long one gets every other chunk however many short ones come."""
        ready = [group for group in self._groups if not group.left]
        waiting = [group for group in self._groups if group.left and not self._gains_by_waiting(group)]
        if not waiting:
            return ready
        self._oldest_next = not self._oldest_next
        return [*ready, waiting[0] if self._oldest_next else min(waiting, key=lambda group: group.left)]

    def _gains_by_waiting(self, group: Group) -> bool:
        """Whether a prompt that is being computed is soon one to go on from: what is left of it is less than what it
        has in common with this one."""
        if group.prefill is not None or not self._runner.limits.continues:
            return False
        return any(
            shared(ahead.ids, prompt.ids) >= max(LEAST_SHARED, other.left)
            for other in self._groups
            if other.prefill is not None
            for ahead in other.prompts
            for prompt in group.missing
        )

    def advance(self, group: Group, *, alone: bool, given_up: Callable[[], bool]) -> bool:
        """A chunk of prefill for a group; True when all its prompts are there. `alone`: nobody outside of the groups
        waits for it. `given_up` as in `Prefill.advance`."""
        if group.prefill is None:
            group.prompts = list(dict.fromkeys(request.prompt for request in group.requests))
        if group.prefill is None and (missing := group.missing):
            group.prefill = self._begin(missing)
        if group.prefill is not None:
            rows, columns = group.prefill.rows, min(self._chunk(group.prefill.rows, alone), group.left)
            begun = time.monotonic()
            done = group.prefill.advance(columns, given_up)
            # A chunk too small to tell does not make the next one small for long.
            seen = columns * rows / max(time.monotonic() - begun, 1e-6)
            self._pace = max(seen, self._pace / 2)
            if not done:
                return False
            for prompt, computed in zip(group.missing, group.prefill.finish(), strict=True):
                group.computed[prompt] = computed
                self.recent.put(prompt, computed)
            group.prefill = None
        return True

    def _begin(self, prompts: list[PromptIds]) -> Prefill:
        if not self._runner.limits.continues:
            return self._runner.begin(prompts)
        return self._runner.begin(prompts, [self.recent.base(prompt) for prompt in prompts])

    def _chunk(self, rows: int, alone: bool) -> int:
        """Columns of the next chunk of prefill. One that nobody else waits for is as long as the configuration has it,
        however fast the machine: so a request alone is computed alike every time."""
        if alone and len(self._groups) == 1:
            return self._most
        fit = int(self._pace * _CHUNK_S / rows) if self._pace else _FIRST_CHUNK
        return min(self._most, max(_MIN_CHUNK, fit))

    def remove(self, group: Group) -> None:
        self._groups.remove(group)

    def drop_cancelled(self) -> list[Request]:
        dropped = [request for request in self.requests if request.cancelled]
        for group in self._groups:
            group.requests = [request for request in group.requests if not request.cancelled]
        self._groups = [group for group in self._groups if group.requests]
        return dropped

    def drop_all(self) -> None:
        self._groups.clear()
