"""What a soft prompt learns, and how well it has learned it, as numbers. Knows batches and losses; knows no optimizer.

`model` is the frozen backbone's own model, in eval mode; `soft_prompt` [virtual_tokens, hidden].
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import torch

from detox_guard.steering.forced import both_logits, contrast, pair_loss, reply_logits, reply_loss
from detox_guard.training.examples import (
    KINDS,
    pairs_for,
    rows_in_batch,
    rows_of,
    texts_for,
    to_device,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.training.config import TrainingConfig
    from detox_guard.training.data import Text
    from detox_guard.training.examples import Examples, Step
    from detox_guard.training.rows import Pair

__all__ = ["heldout_aim", "heldout_loss", "step_loss"]


def step_loss(model: Any, soft_prompt: torch.Tensor, step: Step, config: TrainingConfig) -> torch.Tensor:
    """The loss of one step, a scalar, differentiable in `soft_prompt`.

    Cross-entropy of the toxic replies, plus `anchor_weight` times KL(p_gen‖p_detox) on the harmless ones, plus
    `pair_weight` times the preference loss of the pairs.
    """
    batch, toxic, pairs = to_device(step["batch"], soft_prompt.device), step["toxic"], step["pairs"]
    rude, rest = rows_of(batch, slice(toxic)), rows_of(batch, slice(toxic, None))
    if not len(rest["reply_ids"]):
        return reply_loss(reply_logits(model, soft_prompt, batch, config.position), batch)
    logits, generator = both_logits(model, soft_prompt, batch, config.position)
    harmless = contrast(logits[toxic:], generator[toxic:], rest)
    loss = reply_loss(logits[:toxic], rude) + config.anchor_weight * harmless.divergence
    if pairs:
        twins = contrast(logits[:pairs], generator[:pairs], rows_of(batch, slice(pairs)))
        loss = loss + config.pair_weight * pair_loss(twins.log_ratio, harmless.log_ratio[:pairs])
    return loss


@torch.no_grad()
def heldout_loss(
    model: Any, soft_prompt: torch.Tensor, examples: Examples, texts: Sequence[Text], config: TrainingConfig
) -> dict[str, float]:
    """Nats a reply token, by kind, and their plain mean."""
    losses: dict[str, float] = {}
    for kind in KINDS:
        rng = random.Random(f"{config.seed}/heldout/{kind}")
        total = tokens = 0.0
        own = texts_for(kind, texts)
        for first in range(0, len(own), rows_in_batch(kind, config)):
            batch = examples.batch(kind, own[first : first + rows_in_batch(kind, config)], rng)
            batch = to_device(batch, soft_prompt.device)
            count = float(batch["reply_mask"].sum())
            logits = reply_logits(model, soft_prompt, batch, config.position)
            total += float(reply_loss(logits, batch)) * count
            tokens += count
        losses[kind] = round(total / tokens, 4)
    losses["mean"] = round(sum(losses.values()) / len(KINDS), 4)
    return losses


@torch.no_grad()
def heldout_aim(
    model: Any, soft_prompt: torch.Tensor, examples: Examples, pairs: Sequence[Pair], config: TrainingConfig
) -> dict[str, float]:
    """Share of the pairs whose toxic text the detoxifier favours more than the neutral one, by kind, and their mean."""
    aim: dict[str, float] = {}
    for kind in KINDS:
        above, own = 0, pairs_for(kind, pairs)
        for first in range(0, len(own), rows_in_batch(kind, config)):
            some = own[first : first + rows_in_batch(kind, config)]
            texts = [text for side in zip(*some, strict=True) for text in side]
            batch = examples.batch(kind, texts, random.Random(f"{config.seed}/aim/{kind}/{first}"))
            batch = to_device(batch, soft_prompt.device)
            found = contrast(*both_logits(model, soft_prompt, batch, config.position), batch)
            above += int((found.log_ratio[: len(some)] > found.log_ratio[len(some) :]).sum())
        aim[kind] = round(above / len(own), 4)
    aim["mean"] = round(sum(aim.values()) / len(KINDS), 4)
    return aim
