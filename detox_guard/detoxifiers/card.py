"""What is written down of a soft prompt: for which backbone it is, and how it was made.

Knows plain values; knows no tensor and no file.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

__all__ = ["DataSource", "DetoxifierCard", "Position"]

Position = Literal["front", "reply"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataSource(_Record):
    """One file or hub data set a detoxifier was trained on; `sha256` is of the file's bytes, or of a hub set's rows."""

    name: str
    sha256: str
    rows: int
    licence: str | None = None


class DetoxifierCard(_Record):
    """What a soft prompt is, for which backbone, and how it was made; None where that is not known.

    `position`: "front" puts the virtual tokens before everything (DetoxiGen, arXiv 2401.06947), "reply" between the
    context and the reply. `heldout_loss_*`: nats a reply token, by kind of example and "mean". `heldout_aim`: share of
    held-out pairs whose toxic text has the higher log p_detox - log p_gen. `start_sha256`: the detoxifier gone on from.
    `embedding_scale`: the factor the backbone's embedding layer applies to its own rows (Gemma), already part of ours.
    """

    base_id: str
    base_revision: str | None = None
    hidden_size: PositiveInt
    num_layers: PositiveInt | None = None
    virtual_tokens: PositiveInt
    position: Position = "front"
    initial_text: str | None = None
    data: tuple[DataSource, ...] = ()
    transformers_version: str | None = None
    peft_version: str | None = None
    torch_version: str | None = None
    seed: int | None = None
    steps: int | None = None
    command: str | None = None
    heldout_loss_before: dict[str, float] = Field(default_factory=dict)
    heldout_loss_after: dict[str, float] = Field(default_factory=dict)
    heldout_aim: dict[str, float] = Field(default_factory=dict)
    start_sha256: str | None = None
    embedding_scale: float | None = None
    created: str | None = None
    notes: str = ""
