"""Prefill without padding: each view of each prompt is read alone, behind its own cache. Knows no batch.

Where no other row is there, no mask is needed either: the model makes its own, windows, chunks, recurrences and all. So
it reads a prompt exactly as it would in `generate`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from detox_guard.detoxifiers.base import EmbeddingPrefix, ids_behind, own_contexts
from detox_guard.errors import StepError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from detox_guard.detoxifiers.base import View
    from detox_guard.engine.base import PromptIds
    from detox_guard.engine.torch.reader import Reader
    from detox_guard.engine.torch.states import Past

__all__ = ["SoloPrefill"]


class _Row:
    """One row on its way: what it reads, behind which past."""

    def __init__(self, ids: Sequence[int], past: Past) -> None:
        self.ids, self.past = ids, past
        self.done = 0
        self.logits: Tensor | None = None


class SoloPrefill:
    """The prompts of a few requests, one row after another. The interface is that of `Prefill`."""

    def __init__(self, reader: Reader, prompts: Sequence[PromptIds]) -> None:
        self.reader, self.prompts = reader, prompts
        self.rows = {(i, -1): _Row(prompt.ids, reader.empty()) for i, prompt in enumerate(prompts)}
        """By request and view; view -1 is the generator."""
        for i, prompt in enumerate(prompts):
            if prompt.steered:
                self.rows |= {(i, v): _Row(prompt.ids, past.fork()) for v, past in reader.pasts.items()}
                own = own_contexts(reader.views, prompt.contexts)
                self.rows |= {(i, v): _Row(context, reader.empty()) for v, context in own.items()}
        self.total = sum(len(row.ids) for row in self.rows.values())
        self.done_tokens = 0

    def advance(self, tokens: int) -> bool:
        """Read up to `tokens` more tokens, or all of a prompt that cannot be cut; True when the prompts are in."""
        while tokens > 0 and self.done_tokens < self.total:
            row = next(row for row in self.rows.values() if row.done < len(row.ids))
            ids = row.ids if self.reader.stepwise else row.ids[row.done : row.done + tokens]
            row.logits = self.reader.read(row.past, ids)
            row.done += len(ids)
            self.done_tokens += len(ids)
            tokens -= len(ids)
        return self.done_tokens == self.total

    def finish(self) -> list[tuple[Tensor, list[Past]]]:
        """For each request: logits `[1 + views, vocab]` (1 row if not steered) for its first token, each row's past."""
        if self.done_tokens < self.total:
            raise StepError("prefill finished before its prompts were in")
        out = []
        for i, prompt in enumerate(self.prompts):
            logits, pasts = [], []
            for v in range(-1, len(self.reader.views) if prompt.steered else 0):
                row = self.rows.get((i, v)) or self._behind(self.reader.views[v], prompt, self.rows[i, -1].past)
                assert row.logits is not None
                logits.append(row.logits)
                pasts.append(row.past)
            out.append((torch.cat(logits), pasts))
        return out

    def _behind(self, view: View, prompt: PromptIds, context: Past) -> _Row:
        """A `reply` view: its tokens behind the context that the generator's row read."""
        row = _Row((), context.fork())
        what = view.embeddings if isinstance(view, EmbeddingPrefix) else ids_behind(view, prompt.ids)
        row.logits = self.reader.read(row.past, what)
        return row
