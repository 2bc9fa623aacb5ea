"""Scored words: of an answer or of a tool's result, and how flagged ones are masked. Knows words; asks no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from detox_guard import SCREEN_NOTE, screen
from langchain_core.messages.tool import tool_call

from langchain_detox_guard._words import replaced, words_of

if TYPE_CHECKING:
    from detox_guard import Screened, ToxicityScorer
    from langchain_core.messages import ToolCall


@dataclass(frozen=True)
class Read:
    """Words and their scores."""

    scores: dict[str, Screened]
    known: frozenset[str]

    @property
    def score(self) -> float:
        return max((one.score for one in self.scores.values()), default=0.0)

    @property
    def flagged(self) -> bool:
        return any(one.flagged for one in self.scores.values())

    def flags(self, value: object, *, envelope: bool = False) -> bool:
        """Whether any word in it is flagged; `envelope` as in `words_of`."""
        words = words_of(value, self.known, envelope=envelope)
        return any(word in self.scores and self.scores[word].flagged for word in words)

    def masked(self, text: str) -> str:
        """The text without its flagged sentences; without any of it, if it hides them."""
        if not self.flags(text):
            return text
        own = self.scores.get(text)
        hidden = [word for word in words_of(text, self.known) if word != text]
        if own is None or own.text is None or not own.flagged or self.flags(hidden):
            return SCREEN_NOTE
        return own.text


def read_words(
    value: Any, scorer: str | ToxicityScorer | None, threshold: float, known: frozenset[str] = frozenset()
) -> Read:
    """Every word in it, scored; `known` ones are left out."""
    words = words_of(value, known)
    screened = screen(words, scorer=scorer, threshold=threshold, action="mask")
    return Read(dict(zip(words, screened, strict=True)), known)


def clean_call(call: ToolCall, read: Read) -> ToolCall:
    """The call of the same tool, with the words masked."""
    own = uuid4().hex if read.flags({"id": call["id"]}, envelope=True) else call["id"]
    return tool_call(name=call["name"], args=replaced(call["args"], read.masked), id=own)
