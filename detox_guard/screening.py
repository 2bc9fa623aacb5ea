"""What was retrieved, or came back from a tool, before a model reads it. Knows texts and a scorer; no engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from detox_guard.errors import InvalidParamsError
from detox_guard.scoring import checked_scores, load_scorer
from detox_guard.units import sentences

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.scoring import ToxicityScorer

__all__ = ["NOTE", "Screened", "screen"]

NOTE = "[removed by the toxicity screen]"
_ACTIONS = ("drop", "mask", "mark")


@dataclass(frozen=True)
class Screened:
    """One text after the screen."""

    text: str | None
    """What may be passed on; None if it was dropped."""
    score: float
    """The text's own, before anything was replaced: the worst of the whole and of its sentences."""
    flagged: bool
    """The score is above the threshold."""


def screen(
    texts: Sequence[str],
    *,
    scorer: str | ToxicityScorer | None = None,
    threshold: float = 0.5,
    action: Literal["drop", "mask", "mark"] = "drop",
) -> list[Screened]:
    """Each text scored as a whole and sentence by sentence, in one call of the scorer; in order.

    A text that scores above `threshold` is flagged. "drop" takes it out (`text` is None); "mask" replaces its toxic
    sentences by a note (all of it, if no single sentence is toxic); "mark" leaves it as it is. `scorer` as in
    `load_scorer`. Raises `InvalidParamsError`, and `ScorerError` if the scorer fails: nothing unscored is returned.
    """
    if action not in _ACTIONS:
        raise InvalidParamsError("action", action, f"one of {', '.join(_ACTIONS)}")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise InvalidParamsError("threshold", threshold, "a number from 0 to 1")
    if isinstance(texts, str):
        raise InvalidParamsError("texts", texts, "a list of strings")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise InvalidParamsError(f"texts[{i}]", text, "a string")
    parts = [sentences(text) for text in texts]
    # A text of one sentence is scored once.
    asked = [[text, *own] if len(own) > 1 else [text] for text, own in zip(texts, parts, strict=True)]
    scores = iter(checked_scores(load_scorer(scorer), [piece for pieces in asked for piece in pieces]))
    screened = []
    for pieces in asked:
        own, *each = [next(scores) for _ in pieces]
        worst = max(own, *each, 0.0)
        flagged = worst > threshold
        passed: str | None = pieces[0]
        if flagged and action == "drop":
            passed = None
        elif flagged and action == "mask":
            passed = _masked(pieces[1:], [score > threshold for score in each])
        screened.append(Screened(passed, worst, flagged))
    return screened


def _masked(parts: Sequence[str], toxic: Sequence[bool]) -> str:
    """The text with a note in place of each run of toxic sentences, or of everything if none is toxic by itself."""
    if not any(toxic):
        return NOTE
    out: list[str] = []
    for i, (sentence, bad) in enumerate(zip(parts, toxic, strict=True)):
        if not bad:
            out.append(sentence)
            continue
        space = sentence[len(sentence.rstrip()) :]
        if i and toxic[i - 1]:
            out[-1] = NOTE + space
        else:
            out.append(NOTE + space)
    return "".join(out)
