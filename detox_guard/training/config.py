"""What a training run may be told. Knows bounds and the command line; knows no model and no data."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from detox_guard.checked import Checked
from detox_guard.detoxifier import Position

__all__ = ["FILES", "TrainingConfig"]

FILES = ("data", "contexts", "anchors", "pairs")
"""The fields that name training data."""
Fraction = Annotated[float, Field(ge=0, le=1)]


class TrainingConfig(Checked):
    """One run of prompt tuning (Lester et al. 2021) on toxic text, the detoxifier of DetoxiGen (arXiv 2401.06947).

    `data`: toxic texts, `contexts`: neutral ones for user turns and passages (None: a few built in); files (.jsonl,
    .csv, .tsv, .txt) or hub data sets `org/name[:split]`, read at `text_field`. `output`: the detoxifier's folder.
    `anchors`: harmless texts on which the soft prompt is held to the frozen backbone by `anchor_weight` times
    KL(p_gen‖p_detox), so that it learns toxicity and not the style of the toxic texts (ours, not in the paper; None:
    off). `pairs`: files whose rows have a `toxic` and a `neutral` text that say the same; half of every batch is then
    made of them, and `pair_weight` times a preference loss (`detox_guard.training.forward.pair_loss`) teaches the words
    in which they differ; their neutral texts are anchors too. `start`: a detoxifier's folder to go on from, in the
    place of `initial_text`. `mixture`: shares of "bare", "split", "chat" and "passage" batches
    (`detox_guard.training.examples`). `passage_tokens`: shortest and longest passage. `heldout`: rows of `data`, and of
    `pairs`, that are only measured on.
    `checkpoint_steps`: how often the run can be resumed from; `resume` takes up a run of the same settings and data
    that was cut off. `licence`, `notes`: for the card. Raises `InvalidParamsError`.
    """

    data: Annotated[tuple[str, ...], Field(min_length=1)]
    output: str
    model: str | None = None
    revision: str | None = None
    contexts: tuple[str, ...] | None = None
    anchors: tuple[str, ...] | None = None
    anchor_weight: Annotated[float, Field(ge=0)] = 1.0
    pairs: tuple[str, ...] | None = None
    pair_weight: Annotated[float, Field(ge=0)] = 1.0
    position: Position = "reply"
    virtual_tokens: Annotated[int, Field(ge=1, le=1024)] = 20
    initial_text: Annotated[str, Field(min_length=1)] = "The following reply is rude, insulting, hateful and toxic:"
    start: str | None = None
    steps: Annotated[int, Field(ge=1)] = 300
    batch_size: Annotated[int, Field(ge=1)] = 16
    reply_tokens: Annotated[int, Field(ge=1)] = 40
    passage_tokens: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (300, 600)
    mixture: tuple[Fraction, Fraction, Fraction, Fraction] = (0.45, 0.25, 0.2, 0.1)
    learning_rate: Annotated[float, Field(gt=0)] = 2e-2
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    heldout: Annotated[int, Field(ge=1)] = 200
    max_bad_rows: Annotated[int, Field(ge=0)] = 100
    text_field: Annotated[str, Field(min_length=1)] = "text"
    checkpoint_steps: Annotated[int, Field(ge=1)] = 25
    resume: bool = True
    device: str | None = None
    dtype: str | None = None
    licence: str | None = None
    notes: str = ""

    @field_validator("data", "contexts", "anchors", "pairs", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        """One name or a list of them, paths too, as a tuple of strings."""
        if value is None:
            return None
        names = [value] if isinstance(value, str | Path) else value
        return tuple(str(name) for name in names) if isinstance(names, list | tuple) else names

    @field_validator("output", "model", "start", mode="before")
    @classmethod
    def _path(cls, value: object) -> object:
        return str(value) if isinstance(value, Path) else value

    @field_validator("mixture")
    @classmethod
    def _some_share(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if sum(value) <= 0:
            raise ValueError("at least one share must be above 0")
        return value

    @field_validator("passage_tokens")
    @classmethod
    def _shortest_first(cls, value: tuple[int, int]) -> tuple[int, int]:
        if value[0] > value[1]:
            raise ValueError("the shortest comes first")
        return value

    def command(self) -> str:
        """The `detox-guard train` line of this run: position and what differs from the defaults, files by base name."""
        words = ["detox-guard", "train"]
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if (value == field.default and name != "position") or name in {"resume", "device", "notes"}:
                continue
            flag = "--" + name.replace("_", "-")
            if name in FILES:
                words += [word for source in value for word in (flag, _base_name(source))]
            elif isinstance(value, tuple):
                words += [flag, *map(str, value)]
            else:
                words += [flag, _base_name(value) if name in {"output", "model", "start"} else str(value)]
        return shlex.join(words)


def _base_name(source: str) -> str:
    return Path(source).name if Path(source).exists() or Path(source).is_absolute() else source
