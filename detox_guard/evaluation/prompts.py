"""Prompts and neutral passages from files. Knows their formats and bad rows; knows no model.

RealToxicityPrompts (Gehman et al. 2020) calls a prompt toxic when its Perspective toxicity is at least .5.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from detox_guard.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

__all__ = ["TOXIC_FROM", "EvalPrompt", "Group", "choose_prompts", "read_passages", "read_prompts"]

TOXIC_FROM = 0.5
Group = Literal["toxic", "non-toxic", "all"]


@dataclass(frozen=True, slots=True)
class EvalPrompt:
    """One prompt to continue; `toxicity` in [0, 1] is the data set's own label, None where it has none."""

    text: str
    toxicity: float | None = None

    @property
    def group(self) -> Group:
        """The figures it counts in: "all" is for files without labels."""
        if self.toxicity is None:
            return "all"
        return "toxic" if self.toxicity >= TOXIC_FROM else "non-toxic"


def read_prompts(path: Path) -> list[EvalPrompt]:
    """The prompts of a .jsonl file: RealToxicityPrompts rows (`prompt.text`, `prompt.toxicity`) or `{"prompt": "…"}`.

    In a file with labels, rows whose label is missing or null are left out.
    Raises `DataError` naming the line for anything else, and for a file that is missing, no text, or empty.
    """
    prompts = [_prompt(path, number, line) for number, line in _lines(path)]
    if not prompts:
        raise DataError(f"{path}: no prompt in it", hint='one JSON object a line: {"prompt": "…"}')
    labelled = [prompt for prompt in prompts if prompt.toxicity is not None]
    return labelled or prompts


def choose_prompts(prompts: Sequence[EvalPrompt], limit: int, seed: int) -> list[EvalPrompt]:
    """Up to `limit` prompts of each group, drawn without replacement by `seed`; toxic ones first."""
    rng = np.random.default_rng(seed)
    chosen: list[EvalPrompt] = []
    for group in ("toxic", "non-toxic", "all"):
        members = [prompt for prompt in prompts if prompt.group == group]
        order = rng.permutation(len(members))[:limit]
        chosen += [members[i] for i in sorted(order)]
    return chosen


def read_passages(path: Path) -> list[str]:
    """Neutral paragraphs: the contexts of a SQuAD-format .json file, or the paragraphs of a text file (blank lines
    between them, or one a line). Raises `DataError`."""
    text = _read(path)
    if path.suffix.lower() == ".json":
        try:
            articles = json.loads(text)["data"]
            found = [str(paragraph["context"]).strip() for one in articles for paragraph in one["paragraphs"]]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{path}: not in SQuAD's format ({type(error).__name__}: {error})") from error
    else:
        found = [" ".join(block.split()) for block in text.split("\n\n")]
        if len(found) < 2:
            found = text.splitlines()
    passages = [passage for passage in dict.fromkeys(found) if passage.strip()]
    if not passages:
        raise DataError(f"{path}: no passage in it")
    return passages


def _prompt(path: Path, number: int, line: str) -> EvalPrompt:
    def bad(reason: str) -> DataError:
        return DataError(f"{path}: line {number}: {reason}", hint='RealToxicityPrompts rows, or {"prompt": "…"}')

    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise bad(f"not JSON ({error})") from error
    prompt = row.get("prompt") if isinstance(row, dict) else None
    text, toxicity = (prompt.get("text"), prompt.get("toxicity")) if isinstance(prompt, dict) else (prompt, None)
    if not isinstance(text, str) or not text.strip():
        raise bad("no prompt text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise bad("not valid Unicode") from None
    if toxicity is None:
        return EvalPrompt(text)
    if isinstance(toxicity, bool) or not isinstance(toxicity, int | float) or not 0 <= toxicity <= 1:
        raise bad(f"toxicity {toxicity!r} is no number in [0, 1]")
    return EvalPrompt(text, float(toxicity))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if line.strip():
            yield number, line


def _read(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from error
