"""A scorer that writes down what it passed and when, and what can be read from that: whether a text that a client got
had been scored before. Knows texts and one clock, which all processes of a machine share; knows no HTTP.
"""

from __future__ import annotations

import json
import time
from bisect import bisect_right
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from detox_guard import GuardPolicy, load_scorer

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Marker", "Marks"]

_TAIL = 10
_LOOK_BACK_S = 60.0
_CONTEXT, _CUTS = 150, 3
"""Characters of a long sentence's end that were scored together; spaces before one of which it was cut."""


class Marker:
    """The embedded scorer; each text that it is given goes into a file before its number is told."""

    def __init__(self, path: str | Path) -> None:
        self._scorer = load_scorer(None)
        self.name = self._scorer.name
        self._path = Path(path)

    def score(self, texts: Sequence[str]) -> list[float]:
        """The embedded scorer's numbers."""
        scores = self._scorer.score(texts)
        now = time.monotonic()
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{json.dumps([now, *each])}\n" for each in zip(scores, texts, strict=True)))
        return scores


class Marks:
    """What was passed, and when."""

    def __init__(self, path: str | Path) -> None:
        threshold = GuardPolicy().threshold
        told = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
        self._passed = sorted((when, text.strip()) for when, score, text in told if score <= threshold)
        self._by_tail: dict[str, list[tuple[float, str]]] = defaultdict(list)
        for when, text in self._passed:
            self._by_tail[text[-_TAIL:]].append((when, text))

    def __len__(self) -> int:
        return len(self._passed)

    def passed(self, piece: str, when: float) -> bool:
        """Whether a text with this piece in it was passed before `when`.

        Of a sentence that is longer than a unit: the first part, and the rest with what stands before it.
        """
        piece = piece.strip()
        if piece in ("", GuardPolicy().replacement) or self._held(piece, when):
            return True
        cuts = [at for at, sign in enumerate(piece) if sign == " "][-_CUTS:]
        return self._held(piece[-_CONTEXT:], when) and any(self._held(piece[:at], when) for at in cuts)

    def _held(self, piece: str, when: float) -> bool:
        if any(began <= when and text.endswith(piece) for began, text in self._by_tail.get(piece[-_TAIL:], ())):
            return True
        end = bisect_right(self._passed, (when, "\U0010ffff"))
        for began, text in reversed(self._passed[:end]):
            if began < when - _LOOK_BACK_S:
                return False
            if piece in text:
                return True
        return False
