"""What was retrieved, or came back from a tool, before a model reads it. Knows texts, a scorer, and values that texts
stand in; no engine."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from detox_guard.errors import GuardError, InvalidParamsError
from detox_guard.guard.units import Asked, read_sentences
from detox_guard.scorers.base import TOXIC_FROM, checked_scores, load_scorer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence, Set

    from detox_guard.scorers.base import ToxicityScorer

__all__ = ["SCREEN_NOTE", "Screened", "replace_strings", "screen"]

SCREEN_NOTE = "[removed by the toxicity screen]"
_ACTIONS = ("drop", "mask", "mark")


@dataclass(frozen=True)
class Screened:
    """One text after the screen."""

    text: str | None
    """What may be passed on; None if it was dropped."""
    score: float
    """The text's own, before anything was replaced: the worst of the whole, of its sentences and of what stands in
    those."""
    flagged: bool
    """The score is above the threshold."""


def screen(
    texts: Sequence[str],
    *,
    scorer: str | ToxicityScorer | None = None,
    threshold: float = TOXIC_FROM,
    action: Literal["drop", "mask", "mark"] = "drop",
) -> list[Screened]:
    """Each text scored as a whole and sentence by sentence, in one call of the scorer; in order.

    A sentence is read as a guard reads one: a long one clause by clause too, strings of JSON decoded.
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
    scorer = load_scorer(scorer)
    read = [read_sentences(text) for text in texts]
    asked = [
        list(dict.fromkeys([text, *(one for _, own in each for one in own.texts)]))
        for text, each in zip(texts, read, strict=True)
    ]
    scores = iter(checked_scores(scorer, [one for own in asked for one in own]))
    screened = []
    for text, each, own in zip(texts, read, asked, strict=True):
        score_of = {one: next(scores) for one in own}

        def worst_of(asked: Asked, score_of: dict[str, float] = score_of) -> float:
            return asked.worst([score_of[one] for one in asked.texts], threshold)

        found = [worst_of(asked) for _, asked in each]
        worst = max([score_of[text], *found])
        passed: str | None = text
        if worst > threshold and action == "drop":
            passed = None
        elif worst > threshold and action == "mask":
            passed = _masked([sentence for sentence, _ in each], [one > threshold for one in found])
        screened.append(Screened(passed, worst, worst > threshold))
    return screened


def _masked(parts: Sequence[str], toxic: Sequence[bool]) -> str:
    """The text with a note in place of each run of toxic sentences, or of everything if none is toxic by itself."""
    if not any(toxic):
        return SCREEN_NOTE
    out: list[str] = []
    for i, (sentence, bad) in enumerate(zip(parts, toxic, strict=True)):
        if not bad:
            out.append(sentence)
            continue
        space = sentence[len(sentence.rstrip()) :]
        if i and toxic[i - 1]:
            out[-1] = SCREEN_NOTE + space
        else:
            out.append(SCREEN_NOTE + space)
    return "".join(out)


def replace_strings(value: Any, change: Callable[[str], str], keep: Set[object] = frozenset()) -> Any:
    """The same value with every string changed, in mappings, sequences, sets, pydantic models and dataclasses, however
    deep; keys too, but for those in `keep`. What this cannot look into stays as it is.

    Raises `GuardError` for what is nested too deep to be changed.
    """

    def changed(one: Any) -> Any:
        if isinstance(one, str):
            return change(one)
        if isinstance(one, bytes | bytearray):
            text = one.decode(errors="replace")
            return one if (new := change(text)) == text else type(one)(new.encode())
        if isinstance(one, Mapping):
            return {key if key in keep else changed(key): changed(part) for key, part in one.items()}
        if isinstance(one, list):
            return [changed(part) for part in one]
        if isinstance(one, tuple | set | frozenset):
            parts = [changed(part) for part in one]
            return type(one)(*parts) if hasattr(one, "_fields") else type(one)(parts)
        if isinstance(one, BaseModel):
            held = {**one.__dict__, **(one.__pydantic_extra__ or {})}
            parts_of = {name: changed(part) for name, part in held.items()}
            return one.model_copy(update={name: new for name, new in parts_of.items() if new is not held[name]})
        if dataclasses.is_dataclass(one) and not isinstance(one, type):
            copied = copy.copy(one)  # no field is computed anew, and none is lost
            for field in dataclasses.fields(one):
                if hasattr(one, field.name):
                    object.__setattr__(copied, field.name, changed(getattr(one, field.name)))
            return copied
        return one

    try:
        return changed(value)
    except RecursionError:
        raise GuardError("flagged words are nested too deep to be masked") from None
