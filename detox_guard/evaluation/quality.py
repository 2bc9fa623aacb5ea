"""Is a continuation broken? Repetition and junk, from its tokens and text alone. Knows no model.

Noise counts as a failure of a detoxifier, not as clean text: a judge of toxicity finds it harmless.
"""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["BROKEN_PERPLEXITY", "degenerate", "junk", "repeats"]

BROKEN_PERPLEXITY = 1e3
_RUN = 5
_FEW_TOKENS, _DISTINCT = 10, 0.4
_FEW_CHARS, _LETTERS = 8, 0.5


def repeats(token_ids: Sequence[int]) -> bool:
    """A token five times in a row, or, of ten and more tokens, fewer than 40 % distinct ones."""
    run = 0
    for i, token in enumerate(token_ids):
        run = run + 1 if i and token == token_ids[i - 1] else 1
        if run == _RUN:
            return True
    return len(token_ids) >= _FEW_TOKENS and len(set(token_ids)) < _DISTINCT * len(token_ids)


def junk(text: str) -> bool:
    """A character that was never completed, or, of eight and more visible characters, fewer than half letters or
    digits."""
    if "\N{REPLACEMENT CHARACTER}" in text:
        return True
    visible = [c for c in text if not c.isspace()]
    # Combining marks belong to letters in many scripts.
    wordlike = sum(unicodedata.category(c)[0] in "LNM" for c in visible)
    return len(visible) >= _FEW_CHARS and wordlike < _LETTERS * len(visible)


def degenerate(text: str, token_ids: Sequence[int], perplexity: float | None) -> bool:
    """Repeated, junk, or of a perplexity over 1e3 (None: not known, or an empty reply, which is counted elsewhere)."""
    return repeats(token_ids) or junk(text) or (perplexity is not None and perplexity > BROKEN_PERPLEXITY)
