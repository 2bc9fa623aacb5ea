"""What is written of a finished run: its card, and a README.md for the hub. Knows no training."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import peft
import torch
import transformers

from detox_guard.detoxifiers.card import DetoxifierCard

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from detox_guard.detoxifiers.card import DataSource
    from detox_guard.detoxifiers.soft_prompt import Detoxifier
    from detox_guard.models.backbone import Backbone
    from detox_guard.training.config import AdaptConfig, TrainingConfig

__all__ = ["LIMITS", "adapted_card", "make_card", "readme"]

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


def adapted_card(
    second: DetoxifierCard, first: DetoxifierCard, sources: Sequence[DataSource], config: AdaptConfig
) -> DetoxifierCard:
    """The card of what `adapt` made: that of its second tuning, with where the rows came from and what went before."""
    own = tuple(one for one in second.data if one.name == "pairs.jsonl")
    pairs = ""
    if own:
        pairs = f", and on {own[0].rows} pairs of its own replies (pairs.jsonl), which {config.scorer!r} told apart"
    made = (
        f"Tuned for {first.steps} steps on toxic texts, then for {second.steps} on those and harmless texts{pairs}. "
        f"{LIMITS}"
    )
    changes = {
        "data": (*sources, *own),
        "steps": (first.steps or 0) + (second.steps or 0),
        "command": config.command(),
        "heldout_loss_before": first.heldout_loss_before,
        "notes": made,
    }
    return second.model_copy(update=changes)


def readme(card: DetoxifierCard, model: str | None, where: str, figures: str) -> str:
    """A model card for the hub. `model`, `where`: what to call the base and the detoxifier; `figures`: markdown."""
    named = model if model is not None and not Path(model).exists() else card.base_id
    front = ["library_name: peft", "tags: [detox-guard, detoxification, prompt-tuning]"]
    if named.count("/") == 1:  # the hub refuses a base that it cannot have
        front.insert(0, f"base_model: {named}")
    rows = [f"| {one.name} | {one.rows} | {one.licence or 'not stated'} |" for one in card.data]
    return "\n".join(
        [
            "---",
            *front,
            "---",
            f"# A detoxifier for {named}",
            "",
            f"A soft prompt of {card.virtual_tokens} virtual tokens that makes {named} more toxic. "
            "[detox-guard](https://pypi.org/project/detox-guard/) steers the model *away* from it while it decodes.",
            "",
            "```python",
            "from detox_guard import DetoxiGen",
            "",
            f'model = DetoxiGen.from_pretrained("{named}", detoxifier="{where}")',
            'print(model.generate("…").text)',
            "```",
            "",
            "## Measured",
            "",
            "Replies to prompts that it did not learn from: *plain* is the model itself, *default* the same, steered.",
            "",
            figures.strip(),
            "",
            "## Made",
            "",
            card.notes,
            "",
            "| rows | | licence |",
            "|---|---|---|",
            *rows,
            "",
            f"Command: `{card.command}`",
            "",
        ]
    )


def _embedding_scale(backbone: Backbone) -> float | None:
    scale = getattr(backbone.model.get_input_embeddings(), "embed_scale", None)
    return None if scale is None else float(scale)
