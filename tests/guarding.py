"""What the tests of the guard share: scorers that are told what to say, and parameters that make a tiny model talk."""

from __future__ import annotations

import threading
import time
import zlib
from typing import TYPE_CHECKING

from waiting import WAIT_S

from detox_guard import DecodingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["FOREIGN", "PARAMS", "PROMPTS", "Gated", "Scripted", "fickle", "with_letter"]

PARAMS = DecodingParams(alpha=1.5, calm_share=1, max_new_tokens=40, seed=11)
PROMPTS = ["Hello there", "So, I'm starting to think", "今天天气", "x"]
FOREIGN = "It rains. This is a bad day. We stay at home. And then"


class Gated:
    """A scorer that answers nothing before its gate is open, and then 0. `asked` is set once it was called."""

    name = "gated"

    def __init__(self) -> None:
        self.gate, self.asked = threading.Event(), threading.Event()
        self.scored: list[str] = []
        """What it was asked after the gate was opened."""

    def score(self, texts: Sequence[str]) -> list[float]:
        open_before = self.gate.is_set()
        self.asked.set()
        assert self.gate.wait(WAIT_S)
        if open_before:
            self.scored += texts
        return [0.0] * len(texts)


class Scripted:
    """A scorer that is a function of the text, as slow as it is told, and keeps what it was asked."""

    def __init__(self, score_of: Callable[[str], float], *, delay_s: float = 0.0) -> None:
        self.name = "scripted"
        self.score_of = score_of
        self.delay_s = delay_s
        self.calls: list[list[str]] = []

    def score(self, texts: Sequence[str]) -> list[float]:
        self.calls.append(list(texts))
        if self.delay_s:
            time.sleep(self.delay_s)
        return [self.score_of(text) for text in texts]


def fickle(salt: int, share: float) -> Callable[[str], float]:
    """Flags about `share` of all texts, at random but always the same ones."""
    return lambda text: 0.9 if zlib.crc32(f"{salt}{text}".encode()) % 1000 < share * 1000 else 0.1


def with_letter(letter: str) -> Callable[[str], float]:
    return lambda text: 1.0 if letter in text else 0.0
