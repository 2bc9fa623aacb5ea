"""Drafts: what prompt and reply propose for a reply's next tokens. Knows ids of one request; knows no rows, no logits.

A reply that quotes (a document, code, its own words) repeats runs of tokens. Where its last tokens stand once more,
those behind them are the draft: prompt lookup decoding (Saxena 2023). A draft is fed along with the last token, and
then each token is chosen as ever. So it says which logits are there already, and changes no choice.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

__all__ = ["Drafter"]

_IDS = "i"
_WIDTH = array(_IDS).itemsize
_LOOKED_UP = (3, 2)
"""How many of the last tokens are looked up, one length after the other."""
_COST = 0.3
"""What one more token a row costs, in steps: measured with two rows of 4-bit layers, and more than with others."""
_TRUST, _FORGETS = 2.0, 0.9
"""Tokens that count as accepted before any was drafted; what is left of the past with each draft."""


class Drafter:
    """The drafts of one request. It is asked for less the less of them is accepted, down to nothing."""

    def __init__(self, prompt: Sequence[int], end_ids: Collection[int] = ()) -> None:
        self._prompt = array(_IDS, prompt).tobytes()
        self._end_ids = end_ids
        self._accepted = self._tested = _TRUST

    def propose(self, reply: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may come next. Nothing where the last tokens are new."""
        if (worth := self._worth(most)) == 0:
            return []
        text = self._prompt + array(_IDS, reply).tobytes()
        for count in _LOOKED_UP:
            if (begin := _behind(text, count * _WIDTH)) is not None:
                draft = array(_IDS, text[begin : begin + worth * _WIDTH]).tolist()
                # What ends the reply needs not be fed.
                ends = [at for at, token in enumerate(draft) if token in self._end_ids]
                return draft[: ends[0]] if ends else draft
        return []

    def learn(self, drafted: int, accepted: int) -> None:
        """How much of a draft was chosen. Behind the first other token nothing was tested."""
        self._accepted = self._accepted * _FORGETS + accepted
        self._tested = self._tested * _FORGETS + min(drafted, accepted + 1)

    def _worth(self, most: int) -> int:
        """The length of a draft that gives most tokens for its cost; 0 where none is better than no draft."""
        chance = self._accepted / self._tested
        best, length, tokens = 1.0, 0, 1.0
        for count in range(1, most + 1):
            tokens += chance**count
            if tokens / (1 + _COST * count) > best:
                best, length = tokens / (1 + _COST * count), count
        return length


def _behind(text: bytes, width: int) -> int | None:
    """Where that begins which followed the last place, before the end, with the same last `width` bytes."""
    if len(text) <= width:
        return None
    tail = text[-width:]
    at = text.rfind(tail, 0, len(text) - _WIDTH)
    while at > 0 and at % _WIDTH:
        at = text.rfind(tail, 0, at + width - 1)
    return None if at < 0 else at + width
