"""Prompts on their way into rows, one row after the other. Knows views and one sequence to compute in; knows no batch.

A prompt is computed in blocks that begin at the same places whoever is beside it, so that the same prompt gives the
same numbers. Several prefills may take turns: who gives way takes out what it has, and puts it back later.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from detox_guard.detoxifiers.base import EmbeddingPrefix, ids_behind, own_contexts
from detox_guard.engine.base import shared
from detox_guard.engine.llamacpp.context import State
from detox_guard.engine.runner import Computed
from detox_guard.errors import StepError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from detox_guard.detoxifiers.base import View
    from detox_guard.engine.base import PromptIds
    from detox_guard.engine.llamacpp.context import Context, LoadedModel
    from detox_guard.engine.runner import Base

__all__ = ["Desk", "Prefill"]

_MIN_SLOTS = 512


class Desk:
    """The one sequence that prompts are computed in, and whose turn it is."""

    def __init__(self, model: LoadedModel, block: int, most: int) -> None:
        """`block`: tokens of a pass. `most`: the slots that a row may ever have."""
        self.block, self._model, self._most = block, model, most
        self._context: Context | None = None
        self._owner: weakref.ref[Prefill] | None = None

    def context(self, slots: int) -> Context:
        """The context, with room for so many slots; what it holds stays."""
        old = self._context
        if old is None or old.slots < slots:
            room = max(slots, min(self._most, max(_MIN_SLOTS, slots * 3 // 2)))
            self._context = self._model.context(1, room, self.block)
            if old is not None:
                if old.lengths[0]:
                    self._context.put(0, old.take(0))
                old.close()
        assert self._context is not None
        return self._context

    def take_turn(self, prefill: Prefill) -> None:
        """What the prefill has so far is in the sequence now."""
        owner = self._owner() if self._owner is not None else None
        if owner is prefill:
            return
        context = self.context(max(1, prefill.aside.slots if prefill.aside else 0))
        if owner is not None:
            owner.aside = context.take(0) if context.lengths[0] else None
        context.cut(0, 0)
        self._owner = weakref.ref(prefill)
        if prefill.aside is not None:
            context.put(0, prefill.aside)
            prefill.aside = None

    def clear(self) -> None:
        """Forget whose turn it is, and what was computed."""
        self._owner = None
        if self._context is not None:
            self._context.close()
            self._context = None

    def read(self, part: Sequence[int] | Tensor) -> Tensor:
        """Feed a block of ids or of virtual tokens; the last one's logits."""
        context = self.context((self._context.lengths[0] if self._context else 0) + len(part))
        return context.read_embeddings(part) if isinstance(part, torch.Tensor) else context.read(part)


@dataclass(eq=False)
class _Piece:
    """Something to feed. What the sequence holds and says behind it may be wanted."""

    content: Sequence[int] | Tensor
    start: State | None = None
    """What is put into the sequence first; None goes on with what is there."""
    keep: int = 0
    """What of it stays."""
    row: tuple[int, int] | None = None
    """The row whose prompt is whole behind it: the request, and the view (-1 is the generator)."""


@dataclass(eq=False)
class _Done:
    logits: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    states: dict[tuple[int, int], State] = field(default_factory=dict)


class Prefill:
    """A `Prefill` as the scheduler knows it. `prefixes`: what the tokens of each front view came to."""

    rows = 1
    """One column at a time."""

    def __init__(
        self,
        desk: Desk,
        views: Sequence[View],
        prefixes: dict[int, State],
        prompts: Sequence[PromptIds],
        bases: Sequence[Base | None] = (),
    ) -> None:
        self._desk = desk
        self._prompts = prompts
        self._views = views
        self.aside: State | None = None
        """What was computed of the piece under way, while others have their turn."""
        self._at = 0
        """Tokens of the piece under way that are in."""
        self._done = _Done()
        self._pieces: list[_Piece] = []
        for i, (prompt, base) in enumerate(zip(prompts, bases or [None] * len(prompts), strict=True)):
            self._pieces += self._pieces_of(i, prompt, prefixes, base)
        self.left = sum(len(piece.content) for piece in self._pieces)

    def _pieces_of(self, i: int, prompt: PromptIds, prefixes: dict[int, State], base: Base | None) -> list[_Piece]:
        kept = 0 if base is None else self._whole_blocks(prompt.ids, base.prompt.ids)
        first = base.rows[0] if base is not None and kept else None
        assert first is None or isinstance(first, State)
        pieces = [_Piece(prompt.ids[kept:], start=first, keep=kept, row=(i, -1))]
        if not prompt.steered:
            return pieces
        for v, view in enumerate(self._views):
            if view.place == "reply":
                behind = view.embeddings if isinstance(view, EmbeddingPrefix) else ids_behind(view, prompt.ids)
                pieces.append(_Piece(behind, keep=len(prompt.ids), row=(i, v)))
        others = base.rows[1:] if base is not None else ()
        for v, prefix in prefixes.items():
            state, held = (others[v], kept) if others and kept else (prefix, 0)
            assert isinstance(state, State)
            pieces.append(_Piece(prompt.ids[held:], start=state, keep=prefix.slots + held, row=(i, v)))
        before = own_contexts(self._views, base.prompt.contexts) if base is not None and others else {}
        for v, own in own_contexts(self._views, prompt.contexts).items():
            held = self._whole_blocks(own, before[v]) if v in before else 0
            own_state = others[v] if held else None
            assert own_state is None or isinstance(own_state, State)
            pieces.append(_Piece(own[held:], start=own_state, keep=held, row=(i, v)))
        return pieces

    def _whole_blocks(self, ids: Sequence[int], before: Sequence[int]) -> int:
        """How much is taken of what another one begins with: so a prompt gives the same numbers with it and without.
        The last token is always computed."""
        common = min(shared(ids, before), len(ids) - 1)
        return common - common % self._desk.block

    def advance(self, columns: int, given_up: Callable[[], bool]) -> bool:
        """Whole blocks, so up to one block more than `columns`; `given_up` is asked before each."""
        while self._pieces and columns > 0:
            if given_up():
                return False
            self._desk.take_turn(self)
            columns -= self._block()
        return not self._pieces

    def _block(self) -> int:
        """Compute the next block."""
        piece = self._pieces[0]
        if not self._at:
            context = self._desk.context(1 + (piece.start.slots if piece.start else 0))
            if piece.start is not None:
                context.put(0, piece.start)
            context.cut(0, piece.keep)
        part = piece.content[self._at : self._at + self._desk.block]
        logits = self._desk.read(part)
        self._at += len(part)
        self.left -= len(part)
        if self._at == len(piece.content):
            if piece.row is not None:
                self._done.logits[piece.row] = logits
                self._done.states[piece.row] = self._desk.context(1).take(0)
            self._pieces.pop(0)
            self._at = 0
        return len(part)

    def finish(self) -> list[Computed]:
        if self._pieces:
            raise StepError("prefill finished before its prompts were in")
        found = []
        for i, prompt in enumerate(self._prompts):
            rows = [(i, v) for v in range(-1, len(self._views) if prompt.steered else 0)]
            logits = torch.stack([self._done.logits[row] for row in rows])
            found.append(Computed(logits, [self._done.states[row] for row in rows]))
        return found
