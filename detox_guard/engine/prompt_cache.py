"""Prompts computed lately: the same prompt again costs nothing, one that begins alike only what is new.

Knows saved rows; knows no requests.
"""

from __future__ import annotations

from collections import OrderedDict
from operator import itemgetter
from typing import TYPE_CHECKING

from detox_guard.engine.base import shared
from detox_guard.engine.runner import Base

if TYPE_CHECKING:
    from detox_guard.engine.base import PromptIds
    from detox_guard.engine.runner import Computed

__all__ = ["LEAST_SHARED", "PromptCache"]

LEAST_SHARED = 64
"""Tokens that two prompts have in common, for one to be continued from the other. Fewer are computed again: it takes
no time, and so a prompt behind a short template has the same numbers to the last bit every time."""


class PromptCache:
    """Keeps up to `slots` slots of rows. It is cut down to that by `shrink` alone."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._kept: OrderedDict[PromptIds, Computed] = OrderedDict()
        """Those used longest ago first."""

    def get(self, prompt: PromptIds) -> Computed | None:
        return self._kept.get(prompt)

    def base(self, prompt: PromptIds) -> Base | None:
        """The prompt in here that begins most like this one, if it does so for `LEAST_SHARED` tokens."""
        alike = ((shared(kept.ids, prompt.ids), kept.steered, kept) for kept in self._kept)
        tokens, _, found = max(alike, key=itemgetter(0, 1), default=(0, False, None))
        return None if found is None or tokens < LEAST_SHARED else Base(found, self._kept[found].rows)

    def put(self, prompt: PromptIds, computed: Computed) -> None:
        self._kept[prompt] = computed

    def used(self, prompt: PromptIds) -> None:
        """It is the last one now that will be dropped, if it is here."""
        if prompt in self._kept:
            self._kept.move_to_end(prompt)

    def shrink(self) -> None:
        """Drop what was used longest ago, down to the bound."""
        slots = {prompt: sum(saved.slots for saved in computed.rows) for prompt, computed in self._kept.items()}
        total = sum(slots.values())
        while self._kept and total > self._slots:
            prompt, _ = self._kept.popitem(last=False)
            total -= slots[prompt]

    def clear(self) -> None:
        self._kept.clear()
