"""What a scorer is, and how one is found by its name. Knows the contract and the names; knows no weights, no policy.

A package of yours adds a scorer by an entry point, and `scorer="mine"` finds it::

    [project.entry-points."detox_guard.scorers"]
    mine = "my_package:MyScorer"      # called without arguments; gives a `ToxicityScorer`
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any, Protocol, runtime_checkable

from detox_guard.errors import ScorerError

__all__ = ["GROUP", "TOXIC_FROM", "ToxicityScorer", "checked_scores", "load_scorer"]

GROUP = "detox_guard.scorers"
TOXIC_FROM = 0.5
"""The score from which a text counts as toxic, where nobody says otherwise."""


@runtime_checkable
class ToxicityScorer(Protocol):
    """Anything with a `name` and a batched `score`. A plug-in need not inherit from this.

    One that has weights to load may also have `prepare()`, which loads them before a guard's clock runs.
    """

    @property
    def name(self) -> str:
        """Short and stable, for reports."""

    def score(self, texts: Sequence[str]) -> list[float]:
        """One number in [0, 1] a text, in order; 1 is toxic."""


def checked_scores(scorer: ToxicityScorer, texts: Sequence[str]) -> list[float]:
    """The scorer's numbers, or an error: what cannot be scored must not be let through.

    Raises `ScorerError` for a failing scorer, an answer that is no list, tuple or array (a mapping, text, bytes, a set
    or a generator), what is no number in it, a wrong count, NaN, or a number outside [0, 1].
    """
    if not texts:
        return []
    name = getattr(scorer, "name", type(scorer).__name__)
    try:
        answer = scorer.score(texts)
        if not isinstance(answer, Sequence) and not hasattr(answer, "tolist"):  # an array or tensor is a sequence too
            raise ScorerError(f"scorer {name!r} answered a {type(answer).__name__}, not a list of numbers")
        if isinstance(answer, str | bytes | bytearray | memoryview):
            raise ScorerError(f"scorer {name!r} answered {type(answer).__name__}, not a list of numbers")
        scores = [_number(score) for score in answer]
    except ScorerError:
        raise
    except Exception as error:
        raise ScorerError(f"scorer {name!r} failed: {type(error).__name__}: {error}") from error
    if len(scores) != len(texts):
        raise ScorerError(f"scorer {name!r} gave {len(scores)} scores for {len(texts)} texts")
    for score in scores:
        if not 0.0 <= score <= 1.0:  # false for NaN too
            raise ScorerError(f"scorer {name!r} gave {score}, which is not in [0, 1]")
    return scores


def _number(score: Any) -> float:
    """A score as a float. Text that spells a number is none."""
    if isinstance(score, str | bytes | bytearray):
        raise TypeError(f"{type(score).__name__} is no number")
    return float(score)


def load_scorer(spec: str | ToxicityScorer | None = None) -> ToxicityScorer:
    """None or "embedded": the embedded scorer. "minilm": the small transformer of `scorers.minilm`, fetched once.
    "profanity-check": the package alt-profanity-check, of other authors and other data. A name of the entry-point
    group `detox_guard.scorers`: that one. Another string: a Hugging Face model, `org/model`, or `org/model#LABEL` where
    its toxic label has to be named. A scorer: itself.

    A name gives the same scorer each time. Raises `ScorerError`.
    """
    if spec is None or isinstance(spec, str):
        return _named(spec or "embedded")
    if isinstance(spec, ToxicityScorer):
        return spec
    raise ScorerError(f"{type(spec).__name__} is no scorer", hint="give a name, or an object with .name and .score()")


@functools.cache
def _named(name: str) -> ToxicityScorer:
    if name == "embedded":
        from detox_guard.scorers.linear import EmbeddedScorer

        return EmbeddedScorer.load()
    if name == "minilm":
        from detox_guard.scorers.minilm import MiniLMScorer

        return MiniLMScorer()
    if name == "profanity-check":
        from detox_guard.scorers.words import ProfanityCheck

        return ProfanityCheck()
    if found := entry_points(group=GROUP, name=name):
        (point, *others) = found
        if others:
            raise ScorerError(f"{len(found)} packages have a scorer {name!r}", hint="uninstall all but one")
        try:
            scorer = point.load()()
        except Exception as error:
            raise ScorerError(f"scorer {name!r} ({point.value}): {type(error).__name__}: {error}") from error
        return load_scorer(scorer)
    from detox_guard.scorers.classifier import HuggingFaceScorer

    model_id, _, label = name.partition("#")
    return HuggingFaceScorer(model_id, label=label or None)
