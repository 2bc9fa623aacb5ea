"""The runner over llama.cpp: a row is a sequence. Knows how prompts, rows and views go together; knows no requests."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from detox_guard.detoxifiers.base import EmbeddingPrefix, most_beside
from detox_guard.engine.llamacpp.context import LoadedModel, State
from detox_guard.engine.llamacpp.prefill import Desk, Prefill
from detox_guard.engine.runner import Room, Row, RunnerLimits, rows_for
from detox_guard.errors import StepError, UnsupportedBackboneError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from detox_guard.detoxifiers.base import View
    from detox_guard.engine.base import Bounds, PromptIds, ViewKind
    from detox_guard.engine.llamacpp.context import Context
    from detox_guard.engine.runner import Base, Saved
    from detox_guard.models.backbone import Backbone

__all__ = ["LlamaRunner"]

_BLOCK_CPU, _BLOCK_GPU = 64, 512
_MIN_SLOTS = 256


class LlamaRunner:
    """Runs the GGUF of a backbone and its views (a `Runner`).

    What the rows hold lies in one context, whose memory is taken at once. So it is made anew, larger, when a row joins
    that has no room, and what the rows hold is carried over. It is never made smaller, but for a row that is so long
    that it would not fit else.
    """

    def __init__(self, backbone: Backbone, views: Sequence[View], bounds: Bounds) -> None:
        """Raises `BackboneError`, `UnsupportedBackboneError`."""
        assert backbone.gguf is not None
        facts, how = backbone.gguf.facts, backbone.gguf.how
        kinds: set[ViewKind] = {"tokens"} if facts.embedding_factor is None else {"tokens", "embeddings"}
        self._views = [self._as_taken(view, facts.embedding_factor, backbone.id) for view in views]
        self.device = torch.device("cpu")
        self.weights = tuple(view.weight for view in views)
        self._beside = most_beside(views)
        most = [bound for bound in (backbone.max_positions, backbone.window) if bound is not None]
        self.limits = RunnerLimits(backbone.vocab_size, min(most, default=None), frozenset(kinds), continues=True)
        self._bounds = bounds
        self._most = min(most, default=bounds.max_cached_slots)
        self._rows: list[Row] = []
        self._batch: Context | None = None
        self._model = LoadedModel(backbone.gguf)
        try:
            block = how.get("n_batch") or (_BLOCK_GPU if self._model.on_gpu else _BLOCK_CPU)
            block = min(block, bounds.prefill_chunk)
            self._desk = Desk(self._model, block, self._most)
            self._check_itself(backbone.id)
            self._prefixes = {i: self._prefix(view) for i, view in enumerate(self._views) if view.place == "front"}
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _as_taken(view: View, factor: float | None, name: str) -> View:
        if not isinstance(view, EmbeddingPrefix):
            return view
        if factor is None:
            raise UnsupportedBackboneError(
                f"{name}: llama.cpp does not take a soft prompt for this kind of model as it takes tokens",
                hint='Steer it by a text (Detoxifier.from_text), or leave out engine="llamacpp".',
            )
        return replace(view, embeddings=view.embeddings.float() * factor)

    def _check_itself(self, name: str) -> None:
        """See that rows are shared, cut and computed together as is taken for granted here; a library of another
        version may do otherwise, without a word. Raises `UnsupportedBackboneError`."""
        first, second = 5 % self.limits.vocab_size, 7 % self.limits.vocab_size
        desk = self._desk.context(4)
        desk.read([first])
        wanted = desk.read([second])
        saved = desk.take(0)
        desk.cut(0, 1)
        again = desk.read([second])
        behind = desk.read([first])
        self.join([saved, saved], 1)
        together = self.decode([[first], [second]])[:, 0]
        self.clear()
        for found, expected in ((again, wanted), (together[0], behind)):
            size = max(1.0, float(expected.abs().max()))
            if not bool(torch.isfinite(found).all()) or float((found - expected).abs().max()) > 0.05 * size:
                raise UnsupportedBackboneError(
                    f"{name}: this llama.cpp does not give the same for the same tokens",
                    hint="Install the version of llama-cpp-python that the extra `llamacpp` names.",
                )

    def _prefix(self, view: View) -> State:
        """What the tokens of a front view come to."""
        content = view.embeddings if isinstance(view, EmbeddingPrefix) else view.ids
        self._desk.context(len(content)).cut(0, 0)
        for at in range(0, len(content), self._desk.block):
            self._desk.read(content[at : at + self._desk.block])
        state = self._desk.context(1).take(0)
        self._desk.context(1).cut(0, 0)
        return state

    # -- prompts

    def slots(self, prompt: PromptIds) -> int:
        return prompt.slots(self._beside)

    def room(self, prompt: PromptIds, max_new_tokens: int) -> Room:
        return Room(rows_for(prompt, self), self.slots(prompt) + max_new_tokens)

    def begin(self, prompts: Sequence[PromptIds], bases: Sequence[Base | None] = ()) -> Prefill:
        return Prefill(self._desk, self._views, self._prefixes, prompts, bases)

    # -- rows

    @property
    def rows(self) -> int:
        return len(self._rows)

    def join(self, saved: Sequence[Saved], new: int) -> list[Row]:
        return [self._join(one) for one in saved]

    def _join(self, saved: Saved) -> Row:
        assert isinstance(saved, State)
        row = Row(len(self._rows), saved.slots)
        self._room(row.index + 1, saved.slots + 1).put(row.index, saved)
        self._rows.append(row)
        return row

    def save(self, rows: Sequence[Row]) -> list[State]:
        return [self._held().take(row.index) for row in rows]

    def leave(self, row: Row) -> None:
        batch, last = self._held(), self._rows.pop()
        if last is not row:
            batch.put(row.index, batch.take(last.index))
            self._rows[row.index] = last
        batch.cut(last.index, 0)
        last.index = row.index

    def rewind(self, row: Row, slots: int) -> None:
        if not 0 <= slots < row.length:
            raise StepError(f"rewind of {slots} slots in a row of {row.length}")
        self._held().cut(row.index, row.length - slots)
        row.length -= slots

    def decode(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        if len(tokens) != len(self._rows):
            raise StepError(f"{len(tokens)} tokens for {len(self._rows)} rows")
        batch = self._room(len(tokens), 1 + max(row.length for row in self._rows))
        logits = batch.step([token for (token,) in tokens])
        for row in self._rows:
            row.length += 1
        return logits.unsqueeze(1)

    def clear(self) -> None:
        self._rows.clear()
        self._desk.clear()
        if self._batch is not None:
            self._batch.close()
            self._batch = None

    def close(self) -> None:
        if hasattr(self, "_desk"):
            self.clear()
        self._model.close()

    def _held(self) -> Context:
        if self._batch is None:
            raise StepError("there is no row")
        return self._batch

    def _room(self, rows: int, length: int) -> Context:
        """The context of the batch, with room for so many rows of up to `length` slots."""
        old = self._batch
        if old is not None and rows <= old.sequences and length <= old.slots:
            return old
        had = old.sequences if old is not None else len(self._views) + 1
        need = max([length, *(row.length + 1 for row in self._rows)])
        most_rows = max(rows, min(self._bounds.max_rows, self._bounds.max_cached_slots // need))
        new_rows = min(had if rows <= had else max(rows, 2 * had), most_rows)
        room = max(_MIN_SLOTS, need * 3 // 2)
        new_slots = max(need, min(room, self._most, self._bounds.max_cached_slots // new_rows))
        held = [] if old is None else [old.take(row.index) for row in self._rows]
        if old is not None:
            self._batch = None
            old.close()
        self._batch = batch = self._model.context(new_rows, new_slots, new_rows)
        for index, state in enumerate(held):
            batch.put(index, state)
        return batch
