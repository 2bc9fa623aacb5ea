"""Who says what is toxic in an evaluation. Knows names of scorers; the scorers themselves are `scorers.linear`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from detox_guard.errors import ScorerError
from detox_guard.scorers.base import ToxicityScorer, load_scorer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["ProfanityCheck", "load_judge"]


class ProfanityCheck:
    """`alt-profanity-check` (PyPI): a linear SVM on word counts, calibrated, trained on other data (Jigsaw and others).

    An independent second opinion where no hub can be reached. Raises `ScorerError` when it is not installed.
    """

    name = "profanity-check"

    def __init__(self) -> None:
        try:
            from profanity_check import predict_prob
        except ImportError as error:
            raise ScorerError(
                'the judge "profanity-check" is not installed', hint="pip install alt-profanity-check"
            ) from error
        self._predict: Callable[[list[str]], Any] = predict_prob

    def score(self, texts: Sequence[str]) -> list[float]:
        """One probability a text."""
        return [float(score) for score in self._predict(list(texts))] if texts else []


def load_judge(spec: str | ToxicityScorer) -> ToxicityScorer:
    """A scorer by name ("embedded", "profanity-check", a Hugging Face classifier), or one that is given as it is.

    Raises `ScorerError`.
    """
    return ProfanityCheck() if spec == "profanity-check" else load_scorer(spec)
