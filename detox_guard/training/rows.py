"""The rows of one run: what is read, what is learned from, what is held out. Knows no model and no tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from detox_guard.errors import DataError
from detox_guard.training.data import Prompted, Text, TextPairs, TextRows, read_pairs, read_texts, whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.detoxifiers.card import DataSource
    from detox_guard.training.config import TrainingConfig

__all__ = ["Pair", "Rows", "beginning", "divide", "read_rows", "set_apart", "to_json"]

Row = TypeVar("Row")
Pair = tuple[Text, Text]


@dataclass(frozen=True)
class Rows:
    """All that one run reads. What is held out is only measured on."""

    texts: Sequence[Text]
    heldout: Sequence[Text]
    anchors: Sequence[Text]
    pairs: Sequence[Pair]
    heldout_pairs: Sequence[Pair]
    contexts: Sequence[str]
    sources: Sequence[DataSource]


def read_rows(config: TrainingConfig) -> Rows:
    """Read the files and hub sets that the settings name, and hold some rows out. Raises `DataError`."""

    def read(sources: Sequence[str] | None) -> list[TextRows]:
        more = {"field": config.text_field, "max_bad_rows": config.max_bad_rows, "licence": config.licence}
        return [read_texts(source, **more) for source in sources or ()]  # type: ignore[arg-type]

    data, contexts, anchors = read(config.data), read(config.contexts), read(config.anchors)
    paired = [
        read_pairs(source, max_bad_rows=config.max_bad_rows, licence=config.licence) for source in config.pairs or ()
    ]
    texts, heldout = divide([text for rows in data for text in rows.texts], config)
    pairs, heldout_pairs = divide([pair for rows in paired for pair in rows.pairs], config) if paired else ([], [])
    harmless = list(dict.fromkeys(text for rows in anchors for text in rows.texts))
    random.Random(config.seed).shuffle(harmless)
    every: list[TextRows | TextPairs] = [*data, *contexts, *anchors, *paired]
    return Rows(
        texts=texts,
        heldout=heldout,
        anchors=harmless,
        pairs=pairs,
        heldout_pairs=heldout_pairs,
        contexts=[whole(text) for rows in contexts for text in rows.texts],
        sources=[rows.source for rows in every],
    )


def divide(rows: Sequence[Row], config: TrainingConfig) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows, `config.heldout` or a few more. Equal rows count once, and what follows one prompt
    stays together, so that neither can be on both sides."""
    unique = list(dict.fromkeys(rows))
    random.Random(config.seed).shuffle(unique)
    together: dict[object, list[Row]] = {}
    for row in unique:
        text = row[0] if isinstance(row, tuple) and not isinstance(row, Prompted) else row
        together.setdefault(text.prompt if isinstance(text, Prompted) else row, []).append(row)
    train: list[Row] = []
    heldout: list[Row] = []
    for many in together.values():
        (train if len(heldout) >= config.heldout else heldout).extend(many)
    if not train:
        raise DataError(
            f"{', '.join((*config.data, *(config.pairs or ())))}: {len(unique)} different rows, of which "
            f"{config.heldout} are held out",
            hint="more data, or fewer held-out rows",
        )
    return train, heldout


def set_apart(name: str, texts: Sequence[Text], learned: int, heldout: int, seed: int) -> tuple[list[Text], list[Text]]:
    """Different texts in any order, `learned` of them at most; and others, `heldout` at most, a fifth of all at most.

    Raises `DataError`, which calls them by `name`, where there are too few.
    """
    own = list(dict.fromkeys(texts))
    random.Random(seed).shuffle(own)
    held = min(heldout, len(own) // 5)
    if held < 1:
        raise DataError(f"{len(own)} different {name} texts", hint="five at least; better are thousands")
    return own[held : held + learned], own[:held]


def beginning(text: Text) -> str:
    """What a model may be asked to go on from: what the text follows, else its first words, ten at most."""
    if not isinstance(text, str):
        return text.prompt
    words = text.split()
    return " ".join(words[: max(3, min(10, len(words) // 2))])


def to_json(text: Text) -> dict[str, str]:
    """A row that `read_texts` reads as this text."""
    if isinstance(text, str):
        return {"text": text}
    return {"question" if text.chat else "prompt": text.prompt, "text": text.text.strip()}
