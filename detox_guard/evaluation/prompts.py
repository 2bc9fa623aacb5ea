"""Prompts and neutral passages from files and hub data sets. Knows their formats and bad rows, and a tokenizer to
measure passages with; knows no model.

RealToxicityPrompts (Gehman et al. 2020) calls a prompt toxic when its Perspective toxicity is at least .5, and keeps a
list of "challenging" ones that made every model they tried toxic.
"""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from detox_guard._files import read_text, usable_path
from detox_guard.errors import DataError, InvalidParamsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from detox_guard.models.backbone import Backbone

__all__ = [
    "CLASSES",
    "TOXIC_FROM",
    "Asked",
    "EvalPrompt",
    "Group",
    "choose_prompts",
    "passage_of",
    "read_passages",
    "read_prompts",
]

TOXIC_FROM = 0.5
Group = Literal["toxic", "non-toxic", "all"]
Asked = str | list[dict[str, str]]
"""How a prompt is put to the model: as plain text, or as chat messages."""
CLASSES = ("toxic", "non-toxic", "challenging", "all")
ATTRIBUTES = ("severe_toxicity", "profanity", "sexually_explicit", "flirtation", "identity_attack", "threat", "insult")
FIELDS = ("prompt", "text", "comment", "context")
HINT = 'RealToxicityPrompts rows, {"prompt": "…"} a line, a table with a header, BOLD\'s .json, or a .txt'
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[\w.\[\]%:+-]+))?")
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
    """The prompts of a .jsonl, .csv, .tsv, .json (a list, or BOLD's) or .txt file, or of a hub set `org/name[:split]`.

    A row is RealToxicityPrompts' (`prompt.text`, `prompt.toxicity`, …) or flat: `field` (else the first there is of
    prompt, text, comment, context), and where it has them `toxicity` (or `toxic`), `challenging`, `category`.
    `words` keeps the first so many of each text: openings of comments as prompts. Where rows have labels, those without
    are left out. Raises `DataError` naming the row for anything else, and for a source that is missing or empty.
    """
    if words is not None and words < 1:
        raise InvalidParamsError("words", words, "at least 1")
    prompts = [_prompt(where, row, field, words) for where, row in _rows(source)]
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


def read_passages(path: Path) -> list[str]:
    """Neutral paragraphs: the contexts of a SQuAD-format .json file, or the paragraphs of a text file (blank lines
    between them, or one a line). Raises `DataError`."""
    text = read_text(path)
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


def _prompt(where: str, row: Any, field: str | None, words: int | None) -> EvalPrompt:
    def bad(reason: str) -> DataError:
        return DataError(f"{where}: {reason}", hint=HINT)

    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, dict):
        raise bad("no prompt text")
    name = field or next((one for one in FIELDS if row.get(one)), "prompt")
    prompt = row.get(name)
    labels = prompt if isinstance(prompt, dict) else row
    text = prompt.get("text") if isinstance(prompt, dict) else prompt
    if not isinstance(text, str) or not text.strip():
        raise bad(f"no prompt text ({name!r})")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise bad("not valid Unicode") from None
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


def _rows(source: str | Path) -> Iterator[tuple[str, Any]]:
    """Each row with words for where it stands."""
    path = usable_path(source)
    kind = path.suffix.lower()
    hub = _HUB_ID.fullmatch(str(source)) if isinstance(source, str) and not path.exists() else None
    if hub and kind not in (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt"):
        yield from _numbered(source, "row", _hub_rows(hub["name"], hub["split"] or "train"))
    elif kind in (".csv", ".tsv"):
        try:
            lines = io.StringIO(read_text(path), newline="")
            table = csv.DictReader(lines, delimiter="," if kind == ".csv" else "\t")
            yield from _numbered(source, "row", table)
        except csv.Error as error:
            raise DataError(f"{path}: not a table: {error}") from error
    elif kind == ".json":
        yield from _numbered(source, "row", _json_rows(path))
    else:
        # Not splitlines(): U+2028 inside a prompt ends no line.
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            where = f"{path}: line {number}"
            if line.strip():
                yield where, line.rstrip("\r") if kind == ".txt" else _parsed(line, where)


def _numbered(source: str | Path, word: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{source}: {word} {number}", row) for number, row in enumerate(rows, start=1))


def _json_rows(path: Path) -> list[Any]:
    """A list of rows, or BOLD's `{category: {page: [prompt, …]}}`."""
    data = _parsed(read_text(path), str(path))
    if isinstance(data, list):
        return data
    try:
        return [
            {"prompt": text.strip(), "category": category}
            for category, pages in data.items()
            for texts in pages.values()
            for text in texts
            if text.strip()  # a few of BOLD's are empty
        ]
    except (AttributeError, TypeError) as error:
        raise DataError(f"{path}: neither a list of rows nor in BOLD's format", hint=HINT) from error


def _hub_rows(name: str, split: str) -> Iterable[Any]:
    import datasets

    try:
        rows: Iterable[Any] = datasets.load_dataset(name, split=split)
        return rows
    except Exception as error:  # the library has no common root for what a fetch can raise
        raise DataError(
            f"{name}:{split}: cannot be fetched: {error}", hint="a local file, or org/name[:split]"
        ) from error


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})", hint=HINT) from error


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
