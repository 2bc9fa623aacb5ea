"""Rows that cannot share a pass. Knows pasts and tokens; knows no layer.

What such a row holds is its own affair (a compressed cache, a list of states, its whole input), so it is only ever
copied: to fork, to save, and as the checkpoint that a rewind goes back to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from detox_guard.engine.runner import Row
from detox_guard.engine.torch.states import History
from detox_guard.errors import StepError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from detox_guard.engine.torch.reader import Reader
    from detox_guard.engine.torch.states import Past

__all__ = ["AloneRows"]


class AloneRows:
    """The running batch, a pass a row."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.rows: list[Row] = []
        self._pasts: list[Past] = []
        self._histories: list[History] = []

    def join(self, past: Past) -> Row:
        row = Row(len(self.rows), past.length)
        self.rows.append(row)
        self._pasts.append(past.fork())
        self._histories.append(past.history.fork() if past.history else History([past]))
        return row

    def past(self, row: Row) -> Past:
        """A copy of what a row holds."""
        past = self._pasts[row.index].fork()
        past.history = self._histories[row.index].fork()
        return past

    def remove(self, row: Row) -> None:
        """Drop a row; the last one takes its place."""
        for held in (self._pasts, self._histories):
            held[row.index] = held[-1]  # type: ignore[assignment]
            held.pop()
        last = self.rows.pop()
        if last is not row:
            self.rows[row.index] = last
            last.index = row.index

    def rewind(self, row: Row, slots: int) -> None:
        """Go back to a checkpoint, and read the tokens since again."""
        if slots == 0:
            return
        checkpoint, tokens = self._histories[row.index].rewind(row.length - slots)
        past = self._pasts[row.index] = checkpoint.fork()
        for token in tokens:
            self._reader.read(past, [token])
        row.length = past.length

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Feed `tokens[i]` to row i; logits `[rows, vocab]`."""
        if len(tokens) != len(self.rows):
            raise StepError(f"{len(tokens)} tokens for {len(self.rows)} rows")
        logits = []
        for row, past, history, token in zip(self.rows, self._pasts, self._histories, tokens, strict=True):
            logits.append(self._reader.read(past, [token]))
            row.length = past.length
            if history.feed(token):
                history.keep(past.fork())
        return torch.cat(logits)

    def clear(self) -> None:
        self.rows, self._pasts, self._histories = [], [], []
