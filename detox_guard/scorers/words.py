"""`alt-profanity-check` as a scorer: a linear SVM on word counts. Knows that package; knows no model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from detox_guard.errors import ScorerError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["ProfanityCheck"]


class ProfanityCheck:
    """`alt-profanity-check` (PyPI): calibrated, trained on other data than ours (Jigsaw and others).

    An independent second opinion where no hub can be reached. Raises `ScorerError` when it is not installed.
    """

    name = "profanity-check"

    def __init__(self) -> None:
        try:
            from profanity_check import predict_prob
        except ImportError as error:
            raise ScorerError(
                'the scorer "profanity-check" is not installed', hint="pip install alt-profanity-check"
            ) from error
        self._predict: Callable[[list[str]], Any] = predict_prob

    def score(self, texts: Sequence[str]) -> list[float]:
        """One probability a text."""
        return [float(score) for score in self._predict(list(texts))] if texts else []
