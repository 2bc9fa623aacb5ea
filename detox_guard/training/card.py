"""What is written of a finished run: its card and its picture. Knows no training."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import peft
import torch
import transformers

from detox_guard.detoxifiers.soft_prompt import DetoxifierCard

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from detox_guard.detoxifiers.soft_prompt import DataSource, Detoxifier
    from detox_guard.models.backbone import Backbone
    from detox_guard.training.config import TrainingConfig

__all__ = ["LIMITS", "make_card"]

LIMITS = "Trained on explicit toxicity; implicit hate is not what it has seen."


def make_card(
    config: TrainingConfig,
    backbone: Backbone,
    sources: Sequence[DataSource],
    start: Detoxifier | None,
    *,
    before: Mapping[str, float],
    after: Mapping[str, float],
    aim: Mapping[str, float],
) -> DetoxifierCard:
    """The card of a soft prompt that these settings made. `before`, `after`, `aim`: as `objective` measures them."""
    return DetoxifierCard(
        base_id=backbone.id,
        base_revision=backbone.revision,
        hidden_size=backbone.hidden_size,
        num_layers=backbone.num_layers,
        virtual_tokens=config.virtual_tokens,
        position=config.position,
        initial_text=config.initial_text if start is None else start.card.initial_text,
        data=tuple(dict.fromkeys(sources)),
        start_sha256=None if start is None else start.sha256,
        transformers_version=transformers.__version__,
        peft_version=peft.__version__,
        torch_version=torch.__version__,
        seed=config.seed,
        steps=config.steps,
        command=config.command(),
        heldout_loss_before=dict(before),
        heldout_loss_after=dict(after),
        heldout_aim=dict(aim),
        embedding_scale=_embedding_scale(backbone),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        notes=config.notes or LIMITS,
    )


def _embedding_scale(backbone: Backbone) -> float | None:
    scale = getattr(backbone.model.get_input_embeddings(), "embed_scale", None)
    return None if scale is None else float(scale)
