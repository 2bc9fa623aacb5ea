"""How hard to steer behind a prompt: the strength follows what the prompt provokes. Knows texts and a scorer only.

Where nothing provokes the model it is seldom toxic, while steering costs fluency and right answers all the same. What
the embedded scorer cannot read (other languages, disguised words) scores about its bias, .3 to .5, so has the whole
strength.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from detox_guard.scoring import checked_scores, load_scorer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.params import DecodingParams

__all__ = ["CALM", "PROVOKING", "strength_behind"]

CALM, PROVOKING = 0.15, 0.25
"""Scores (embedded scorer) up to which a prompt is harmless, and from which it has the whole strength."""


def strength_behind(texts: Sequence[str], params: DecodingParams) -> float:
    """The alpha to decode with behind a prompt of these texts (`detox_guard.text.prompt_texts`): `params.alpha`, less
    where none of them is toxic, down to `calm_share` of it. The worst text counts. Raises `ScorerError`."""
    if params.alpha == 0 or params.calm_share == 1:
        return params.alpha
    score = max(checked_scores(load_scorer(), texts), default=0.0)
    rise = min(max((score - CALM) / (PROVOKING - CALM), 0.0), 1.0)
    return params.alpha * (params.calm_share + (1 - params.calm_share) * rise)
