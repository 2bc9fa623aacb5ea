"""`/v1/moderations`: our scorers on texts, sentence by sentence and whole. Knows scorers by name; knows no model."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from detox_guard.guard.screen import screen
from detox_guard.guard.units import read_sentences
from detox_guard.scorers.base import TOXIC_FROM, load_scorer
from detox_guard.server.errors import ApiError

if TYPE_CHECKING:
    from detox_guard.scorers.base import ToxicityScorer
    from detox_guard.server.config import ServerConfig
    from detox_guard.server.schemas import ModerationRequest

__all__ = ["moderate"]

_OPENAIS = ("omni-moderation", "text-moderation")
"""What clients of OpenAI's name by themselves stands for the guard's own."""


def moderate(body: ModerationRequest, config: ServerConfig) -> dict[str, Any]:
    """The answer. Takes a while: not for the event loop. Raises `ApiError`, `ScorerError`."""
    texts = body.texts
    if len(texts) > config.max_messages:
        raise ApiError(400, f"At most {config.max_messages} texts.", "too_many", param="input")
    scorer = _scorer(body.model, config)
    standing = TOXIC_FROM if config.guard is None else config.guard.threshold
    threshold = standing if body.threshold is None else body.threshold
    parts = [[sentence for sentence, _ in read_sentences(text)] for text in texts]
    asked = [*texts, *(sentence for each in parts for sentence in each)]
    scores = iter([one.score for one in screen(asked, scorer=scorer, threshold=threshold, action="mark")])
    wholes = [next(scores) for _ in texts]
    results = []
    for whole, each in zip(wholes, parts, strict=True):
        own = [(sentence, next(scores)) for sentence in each]
        results.append(
            {
                "flagged": whole > threshold,
                "categories": {"toxicity": whole > threshold},
                "category_scores": {"toxicity": whole},
                "category_applied_input_types": {"toxicity": ["text"]},
                "sentences": [
                    {"text": sentence, "score": score, "flagged": score > threshold} for sentence, score in own
                ],
            }
        )
    return {"id": f"modr-{secrets.token_hex(12)}", "model": scorer.name, "threshold": threshold, "results": results}


def _scorer(name: str | None, config: ServerConfig) -> ToxicityScorer:
    own = load_scorer(None if config.guard is None else config.guard.scorer)
    if name is None or name == own.name or name.startswith(_OPENAIS):
        return own
    if name not in config.scorers:
        there = ", ".join([own.name, *config.scorers])
        raise ApiError(404, f"No scorer {name[:80]!r} here, but: {there}.", "model_not_found", param="model")
    return load_scorer(name)
