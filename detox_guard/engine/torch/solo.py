"""Prefill without padding: each view of each prompt is read alone, behind its own cache. Knows no batch.

Where no other row is there, no mask is needed either: the model makes its own, windows, chunks, recurrences and all. So
it reads a prompt exactly as it would in `generate`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from detox_guard.errors import StepError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from detox_guard.engine.torch.reader import Reader
    from detox_guard.engine.torch.states import Past

__all__ = ["SoloPrefill"]


class _View:
    """One row on its way: the generator's (stream -1), or that of a view in front."""

    def __init__(self, prompt: int, stream: int, ids: Sequence[int], past: Past) -> None:
        self.prompt, self.stream, self.ids, self.past = prompt, stream, ids, past
        self.done = 0
        self.logits: Tensor | None = None


class SoloPrefill:
    """The prompts of a few requests, one view after another. The interface is that of `Prefill`."""

    def __init__(self, forward: Reader, prompts: Sequence[Sequence[int]], guarded: Sequence[bool]) -> None:
        self.forward, self.prompts, self.guarded = forward, prompts, guarded
        self._views = [_View(i, -1, ids, forward.empty()) for i, ids in enumerate(prompts)]
        for i, ids in enumerate(prompts):
            if guarded[i]:
                self._views += [_View(i, s, ids, past.fork()) for s, past in forward.pasts.items()]
        self.rows = [(view.prompt, view.stream) for view in self._views]
        self.total = sum(len(view.ids) for view in self._views)
        self.done_tokens = 0

    def advance(self, tokens: int) -> bool:
        """Read up to `tokens` more tokens, or all of a prompt that cannot be cut; True when the prompts are in."""
        while tokens > 0 and self.done_tokens < self.total:
            view = next(view for view in self._views if view.done < len(view.ids))
            ids = view.ids if self.forward.stepwise else view.ids[view.done : view.done + tokens]
            view.logits = self.forward.read(view.past, ids)
            view.done += len(ids)
            self.done_tokens += len(ids)
            tokens -= len(ids)
        return self.done_tokens == self.total

    def finish(self) -> list[tuple[Tensor, list[Past]]]:
        """For each request: logits `[1 + streams, vocab]` (1 row if unguarded) for its first token, each row's past."""
        if self.done_tokens < self.total:
            raise StepError("prefill finished before its prompts were in")
        done = {(view.prompt, view.stream): (view.logits, view.past) for view in self._views}
        for i, guarded in enumerate(self.guarded):
            for s, spec in enumerate(self.forward.streams if guarded else ()):
                if s not in self.forward.pasts:
                    past = done[i, -1][1].fork()
                    done[i, s] = self.forward.read(past, spec.embeddings), past
        out = []
        for i, guarded in enumerate(self.guarded):
            rows = [done[i, s] for s in range(-1, len(self.forward.streams) if guarded else 0)]
            out.append((torch.cat([logits for logits, _ in rows if logits is not None]), [past for _, past in rows]))
        return out
