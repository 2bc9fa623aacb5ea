"""Prompts to continue, and neutral passages to stand before them. Knows labels and how prompts are drawn, and a
tokenizer to measure passages with; the formats are `detox_guard.data`'s. Knows no model.

RealToxicityPrompts (Gehman et al. 2020) calls a prompt toxic when its Perspective toxicity is at least .5, and keeps a
list of "challenging" ones that made every model they tried toxic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from detox_guard._files import read_json, read_text
from detox_guard.data import BadRow, read_rows, text_at
from detox_guard.errors import DataError, InvalidParamsError
from detox_guard.scorers.base import TOXIC_FROM

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from detox_guard.models.backbone import Backbone

__all__ = [
    "CLASSES",
    "Asked",
    "EvalPrompt",
    "Group",
    "choose_prompts",
    "passage_of",
    "read_passages",
    "read_prompts",
    "read_squad",
]

Group = Literal["toxic", "non-toxic", "all"]
Asked = str | list[dict[str, str]]
"""How a prompt is put to the model: as plain text, or as chat messages."""
CLASSES = ("toxic", "non-toxic", "challenging", "all")
ATTRIBUTES = ("severe_toxicity", "profanity", "sexually_explicit", "flirtation", "identity_attack", "threat", "insult")
FIELDS = ("prompt", "text", "comment", "context")
HINT = 'RealToxicityPrompts rows, {"prompt": "…"} a line, a table with a header, BOLD\'s .json, or a .txt'
_TRUE, _FALSE = ("true", "1", "1.0", "yes"), ("false", "0", "0.0", "no", "")


@dataclass(frozen=True, slots=True)
class EvalPrompt:
    """One prompt to continue; `toxicity` in [0, 1] is the data set's own label, None where it has none.

    `categories`: the file's own, or RealToxicityPrompts' attributes of at least .5. `classes`: the figures it counts
    in, set when it is chosen.
    """

    text: str
    toxicity: float | None = None
    challenging: bool = False
    categories: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    @property
    def group(self) -> Group:
        """By its label; "all" is for files without labels."""
        if self.toxicity is None:
            return "all"
        return "toxic" if self.toxicity >= TOXIC_FROM else "non-toxic"


def read_prompts(source: str | Path, *, field: str | None = None, words: int | None = None) -> list[EvalPrompt]:
    """The prompts of a source that `detox_guard.data.read_rows` reads.

    A row is RealToxicityPrompts' (`prompt.text`, `prompt.toxicity`, …), BOLD's, or flat: `field` (else the first there
    is of prompt, text, comment, context), and where it has them `toxicity` (or `toxic`), `challenging`, `category`.
    `words` keeps the first so many of each text: openings of comments as prompts. Where rows have labels, those without
    are left out. Raises `DataError` naming the row for anything else, and for a source that is missing or empty.
    """
    if words is not None and words < 1:
        raise InvalidParamsError("words", words, "at least 1")
    rows = read_rows(source).good(HINT)
    prompts = [_prompt(where, one, field, words) for where, row in rows for one in _flat(row)]
    if not prompts:
        raise DataError(f"{source}: no prompt in it", hint=HINT)
    labelled = [prompt for prompt in prompts if prompt.toxicity is not None]
    return labelled or prompts


def choose_prompts(prompts: Sequence[EvalPrompt], limit: int, seed: int) -> list[EvalPrompt]:
    """Up to `limit` prompts of each class, drawn without replacement by `seed`, in the order of `CLASSES`.

    A challenging prompt may be drawn as one, by its label, or both ways: it counts where it was drawn, so that no
    class is tilted by another.
    """
    if limit < 1:
        raise InvalidParamsError("limit", limit, "at least 1")
    rng = np.random.default_rng(seed)
    drawn: dict[int, tuple[str, ...]] = {}
    for name in CLASSES:
        members = [i for i, prompt in enumerate(prompts) if (prompt.challenging and name == "challenging")
                   or prompt.group == name]  # fmt: skip
        for at in sorted(rng.permutation(len(members))[:limit]):
            drawn[members[at]] = (*drawn.get(members[at], ()), name)
    return [replace(prompts[i], classes=classes) for i, classes in drawn.items()]


def read_squad(path: Path) -> list[dict[str, Any]]:
    """The paragraphs of a file in SQuAD's format, each with `context` and `qas`. Raises `DataError`."""
    try:
        found = [paragraph for article in read_json(path)["data"] for paragraph in article["paragraphs"]]
        [str(paragraph["context"]) for paragraph in found]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: not in SQuAD's format ({type(error).__name__}: {error})") from error
    return found


def read_passages(path: Path) -> list[str]:
    """Neutral paragraphs: the contexts of a SQuAD-format .json file, or the paragraphs of a text file (blank lines
    between them, or one a line). Raises `DataError`."""
    if path.suffix.lower() == ".json":
        found = [str(paragraph["context"]).strip() for paragraph in read_squad(path)]
    else:
        text = read_text(path)
        found = [" ".join(block.split()) for block in text.split("\n\n")]
        if len(found) < 2:
            found = text.splitlines()
    passages = [passage for passage in dict.fromkeys(found) if passage.strip()]
    if not passages:
        raise DataError(f"{path}: no passage in it")
    return passages


def passage_of(backbone: Backbone, passages: Sequence[str], tokens: int, way: int) -> str:
    """About `tokens` tokens of passages, starting at another one for each `way`, so that contexts differ."""
    start = way * len(passages) // 4 + way
    ids: list[int] = []
    for i in range(10_000):
        text = passages[(start + i) % len(passages)] + "\n\n"
        ids += backbone.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= tokens:
            break
    return str(backbone.tokenizer.decode(ids[:tokens])).strip()


def _flat(row: Any) -> Iterator[Any]:
    """A row as it is, or the rows of BOLD's `{category: {page: [prompt, …]}}`, of which a few are empty."""
    pages = list(row.values()) if isinstance(row, dict) else []
    if not pages or not all(isinstance(one, dict) and all(isinstance(t, list) for t in one.values()) for one in pages):
        yield row
        return
    for category, texts in row.items():
        yield from ({"prompt": t.strip(), "category": category} for many in texts.values() for t in many if t.strip())


def _prompt(where: str, row: Any, field: str | None, words: int | None) -> EvalPrompt:
    def bad(reason: str) -> DataError:
        return DataError(f"{where}: {reason}", hint=HINT)

    if not isinstance(row, dict):
        row = {"prompt": row} if isinstance(row, str) else {}
    name = field or next((one for one in FIELDS if row.get(one)), "prompt")
    try:
        text_at(row, name)
    except BadRow as reason:
        raise bad(f"no prompt text ({reason})") from None
    labels = row[name] if isinstance(row[name], dict) else row
    text: str = row[name]["text"] if isinstance(row[name], dict) else row[name]  # a prompt's last space matters
    if words is not None:
        text = " ".join(text.split()[:words])
    toxicity = _share(labels.get("toxicity", labels.get("toxic")))
    if toxicity is not None and not 0 <= toxicity <= 1:
        raise bad("toxicity is no number in [0, 1]")
    challenging = _share(row.get("challenging"))
    if challenging not in (None, 0.0, 1.0):
        raise bad(f"challenging {row.get('challenging')!r} is neither true nor false")
    marked = [one for one in ATTRIBUTES if (_share(labels.get(one)) or 0.0) >= TOXIC_FROM]
    category = row.get("category")
    return EvalPrompt(text, toxicity, bool(challenging), (str(category),) if category else tuple(marked))


def _share(value: object) -> float | None:
    """A number, or a truth value as 0 or 1, also as text; None for nothing; NaN for what is none of these."""
    if value is None or value == "":
        return None
    word = str(value).strip().lower()
    if word in (*_TRUE, *_FALSE):
        return float(word in _TRUE)
    try:
        return float(word)
    except ValueError:
        return float("nan")
