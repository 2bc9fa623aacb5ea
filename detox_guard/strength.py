"""How hard to steer behind a prompt: the strength follows what the prompt provokes. Knows texts and a scorer only.

Where nothing provokes the model it is seldom toxic, while steering costs fluency and right answers all the same. What
the embedded scorer cannot read (other languages, disguised words) scores about its bias, .3 to .5, so a prompt of
nothing else has the whole strength; beside harmless English it drowns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from detox_guard.scoring import checked_scores, load_scorer
from detox_guard.units import sentences

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.params import DecodingParams

__all__ = ["SENTENCE", "WHOLE", "strength_behind"]

WHOLE, SENTENCE = (0.15, 0.25), (0.35, 0.55)
"""Scores (embedded scorer) up to which a prompt is harmless, and from which it has the whole strength: of all its text,
and of its worst sentence, which drowns in a long text, but by itself scores higher even if it is harmless."""


def strength_behind(texts: Sequence[str], params: DecodingParams) -> float:
    """The alpha to decode with behind a prompt of these texts (`detox_guard.text.prompt_texts`): `params.alpha`, less
    where nothing in them is toxic, down to `calm_share` of it. Raises `ScorerError`."""
    if params.alpha == 0 or params.calm_share == 1:
        return params.alpha
    parts = [part for text in texts for part in sentences(text) if part.strip()]
    # A lone sentence is the whole, and scored once: its own ramp lies higher.
    whole, *each = checked_scores(load_scorer(), ["\n".join(texts), *(parts if len(parts) > 1 else [])])
    provoking = max(_rise(whole, WHOLE), _rise(max(each, default=0.0), SENTENCE))
    return params.alpha * (params.calm_share + (1 - params.calm_share) * provoking)


def _rise(score: float, ramp: tuple[float, float]) -> float:
    low, high = ramp
    return min(max((score - low) / (high - low), 0.0), 1.0)
