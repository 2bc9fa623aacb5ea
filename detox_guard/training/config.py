"""What a training run may be told. Knows bounds and the command line; knows no model and no data."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator

from detox_guard.detoxifiers.card import Position
from detox_guard.models.options import LoadOptions

if TYPE_CHECKING:
    from collections.abc import Set

__all__ = ["FILES", "AdaptConfig", "TrainingConfig"]

FILES = ("data", "contexts", "anchors", "pairs")
"""The fields that name training data."""
Fraction = Annotated[float, Field(ge=0, le=1)]


class _Tuned(LoadOptions):
    """How a model is loaded that a soft prompt is tuned for."""

    @field_validator("engine")
    @classmethod
    def _has_gradients(cls, value: str) -> str:
        if value != "torch":
            raise ValueError('"torch", which has gradients; llama.cpp serves what was tuned there')
        return value


class TrainingConfig(_Tuned):
    """One run of prompt tuning (Lester et al. 2021) on toxic text, the detoxifier of DetoxiGen (arXiv 2401.06947).

    Raises `InvalidParamsError`.
    """

    data: Annotated[tuple[str, ...], Field(min_length=1)]
    """Toxic texts: .jsonl, .csv, .tsv, .txt or hub set org/name[:split]."""
    output: str
    """Folder of the detoxifier."""
    model: str | None = None
    """Hub id, folder or .gguf file; else the embedded default model."""
    contexts: tuple[str, ...] | None = None
    """Neutral texts for user turns and passages; else a few that are built in."""
    anchors: tuple[str, ...] | None = None
    """Harmless texts on which the soft prompt must not differ from the backbone. Ours, not the paper's."""
    anchor_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of KL(p_gen‖p_detox) on the anchors."""
    pairs: tuple[str, ...] | None = None
    """Rows with a toxic and a neutral text that say the same. Half of every batch is made of them then."""
    pair_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the preference loss on the pairs (`detox_guard.steering.forced.pair_loss`)."""
    position: Position = "reply"
    """Where the virtual tokens stand: before the reply, or in front of the whole context."""
    virtual_tokens: Annotated[int, Field(ge=1, le=1024)] = 20
    """Length of the soft prompt."""
    initial_text: Annotated[str, Field(min_length=1)] = "The following reply is rude, insulting, hateful and toxic:"
    """Text whose embeddings it starts from."""
    start: str | None = None
    """Folder of a detoxifier to go on from, in the place of the initial text."""
    steps: Annotated[int, Field(ge=1)] = 300
    """Optimizer steps."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Texts a step."""
    reply_tokens: Annotated[int, Field(ge=1)] = 40
    """Longest reply, in tokens."""
    passage_tokens: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (300, 600)
    """Shortest and longest passage, in tokens."""
    mixture: tuple[Fraction, Fraction, Fraction, Fraction] = (0.45, 0.25, 0.2, 0.1)
    """Shares of bare, split, chat and passage batches (`detox_guard.training.examples`)."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-2
    """Peak of the cosine schedule."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the order, the layouts and the split."""
    heldout: Annotated[int, Field(ge=1)] = 200
    """Rows of the data, and of the pairs, that are only measured on."""
    max_bad_rows: Annotated[int, Field(ge=0)] = 100
    """Unusable rows a file may have."""
    text_field: Annotated[str, Field(min_length=1)] = "text"
    """Column or key of the text."""
    checkpoint_steps: Annotated[int, Field(ge=1)] = 25
    """How often the run can be resumed from."""
    resume: bool = True
    """Take up a run of the same settings and data that was cut off."""
    licence: str | None = None
    """Licence of the data, for the card."""
    notes: str = ""
    """For the card."""

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
        return _command("train", self, leave={"resume", "device", "notes"}, always={"position"})


class AdaptConfig(_Tuned):
    """What `detox_guard.adapt.adapt` may be told. Without a `dtype` it computes in float32 on a CPU.

    Raises `InvalidParamsError`.
    """

    model: str | None = None
    """Hub id, folder or .gguf file; else the embedded default model."""
    output: str | None = None
    """Folder of the detoxifier; else the model's name and "-detoxifier", here."""
    data: tuple[str, ...] | None = None
    """Toxic texts: .jsonl, .csv, .tsv, .txt or hub set org/name[:split]; else google/civil_comments, which is CC0."""
    anchors: tuple[str, ...] | None = None
    """Harmless texts of the same kind as the toxic ones; needed with data of your own."""
    text_field: Annotated[str, Field(min_length=1)] = "text"
    """Column or key of the text."""
    licence: str | None = None
    """Licence of data of your own, for the card."""
    prompts: str | None = None
    """Prompts to measure on, as detox-guard eval takes them; else beginnings of rows that are held out."""
    minutes: Annotated[float, Field(gt=0)] = 45.0
    """How long it may take. What is done is planned once, from the time that a step takes."""
    steps: Annotated[int, Field(ge=4)] | None = None
    """Steps of both tunings together, in the place of a plan by the clock."""
    scorer: Annotated[str, Field(min_length=1)] = "embedded"
    """Tells the model's own toxic replies from its harmless ones."""
    judges: Annotated[tuple[str, ...], Field(min_length=1)] = ("profanity-check", "embedded")
    """Scorers that grade it before and after."""
    virtual_tokens: Annotated[int, Field(ge=1, le=1024)] = 20
    """Length of the soft prompt."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of everything that is drawn."""
    push_to_hub: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None
    """Put it on the hub as org/name when it is done."""

    @field_validator("data", "anchors", "judges", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        """One name or a list of them, paths too, as a tuple of strings."""
        names = [value] if isinstance(value, str | Path) else value
        return tuple(str(name) for name in names) if isinstance(names, list | tuple) else names

    @field_validator("model", "output", "prompts", mode="before")
    @classmethod
    def _path(cls, value: object) -> object:
        return str(value) if isinstance(value, Path) else value

    @property
    def folder(self) -> Path:
        """The output folder."""
        if self.output is not None:
            return Path(self.output)
        name = "default" if self.model is None else Path(self.model.rstrip("/\\")).name
        return Path(f"{name.removesuffix('.gguf')}-detoxifier")

    def command(self) -> str:
        """The `detox-guard adapt` line of this run."""
        return _command("adapt", self, leave={"device", "push_to_hub", "output"})


def _command(name: str, config: _Tuned, leave: Set[str], always: Set[str] = frozenset()) -> str:
    words = ["detox-guard", name]
    for field, facts in type(config).model_fields.items():
        value = getattr(config, field)
        if field in leave or field in LoadOptions.model_fields or (value == facts.default and field not in always):
            continue
        flag = "--" + field.replace("_", "-")
        if name == "adapt" and field == "model":
            words.append(_base_name(value))
        elif field in (*FILES, "judges"):
            words += [
                word
                for source in value
                for word in (flag.removesuffix("s") if field == "judges" else flag, _base_name(source))
            ]
        elif isinstance(value, tuple):
            words += [flag, *map(str, value)]
        else:
            words += [flag, _base_name(value) if field in {"output", "model", "start", "prompts"} else str(value)]
    for field, value in config.told().items():
        if field not in leave:
            flag = "--quantize" if field == "quantization_config" else "--" + field.replace("_", "-")
            shown = json.dumps(value) if isinstance(value, dict) else str(value)
            words += [flag] if value is True else [flag, shown]
    return shlex.join(words)


def _base_name(source: str) -> str:
    return Path(source).name if Path(source).exists() or Path(source).is_absolute() else source
