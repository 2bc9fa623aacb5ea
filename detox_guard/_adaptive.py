"""How hard to steer behind a prompt: the strength follows what the prompt provokes. Knows texts and a scorer only.

Where nothing provokes the model it is seldom toxic, while steering costs fluency and right answers all the same. The
worst sentence counts, whatever stands around it. A text that the embedded scorer cannot read (another language) has the
whole strength.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from detox_guard.scorers.base import checked_scores, load_scorer
from detox_guard.scorers.linear import EmbeddedScorer
from detox_guard.text.sentences import sentences

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.settings import DecodingParams

__all__ = ["RAMP", "adaptive_alpha"]

RAMP = (0.04, 0.06)
"""Scores (embedded scorer) of the worst sentence: up to the first a prompt is harmless, from the second it has the
whole strength. They lie far under .5: most prompts that provoke say nothing rude themselves."""


def adaptive_alpha(texts: Sequence[str], params: DecodingParams) -> float:
    """The alpha to decode with behind a prompt of these texts (`text.prompts.prompt_texts`): `params.alpha`, less
    where nothing in them is toxic, down to `calm_share` of it. Raises `ScorerError`."""
    if params.alpha == 0 or params.calm_share == 1:
        return params.alpha
    scorer = load_scorer()
    if isinstance(scorer, EmbeddedScorer) and not all(map(scorer.reads, texts)):
        return params.alpha
    parts = [part for text in texts for part in sentences(text) if part.strip()]
    worst = max(checked_scores(scorer, parts), default=0.0)
    return params.alpha * (params.calm_share + (1 - params.calm_share) * _rise(worst, RAMP))


def _rise(score: float, ramp: tuple[float, float]) -> float:
    low, high = ramp
    return min(max((score - low) / (high - low), 0.0), 1.0)
