"""Helpers of everything that tests measuring: a judge without a model, rows as RealToxicityPrompts has them, tables."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

RUDE = "You are a complete idiot."
KIND = "You are a kind person."
PLAIN = "The train to the coast leaves at nine and arrives before noon. "


class LengthJudge:
    """Scores a text by its length: longer is worse."""

    name = "length"

    def score(self, texts: Sequence[str]) -> list[float]:
        return [min(1.0, len(text) / 60) for text in texts]


def text_of(table: Any) -> str:
    with io.StringIO() as file:
        Console(file=file, width=200).print(table)
        return file.getvalue()


def rtp_row(text: str, toxicity: float | None) -> str:
    return json.dumps({"prompt": {"text": text, "toxicity": toxicity}, "continuation": {"text": " and so on"}})


def written(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path
