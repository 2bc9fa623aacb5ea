"""How likely the plain backbone finds a reply. Knows token ids and one forward pass; knows no engine, no steering."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.backbone import Backbone

__all__ = ["reply_nll"]


@torch.inference_mode()
def reply_nll(backbone: Backbone, prompt_ids: Sequence[int], replies: Sequence[Sequence[int]]) -> list[float]:
    """Nats of each reply given the prompt, summed over its tokens; 0 for an empty reply.

    The model's whole distribution at temperature 1, in float32. All replies go through one batch.
    """
    longest = max((len(reply) for reply in replies), default=0)
    if longest == 0:
        return [0.0] * len(replies)
    # Padding stands behind the replies, where causal attention hides it: no mask, and positions are the default ones.
    ids = torch.full((len(replies), len(prompt_ids) + longest), backbone.pad_token_id)
    ids[:, : len(prompt_ids)] = torch.tensor(list(prompt_ids))
    lengths = torch.tensor([len(reply) for reply in replies], device=backbone.device)
    for row, reply in enumerate(replies):
        ids[row, len(prompt_ids) : len(prompt_ids) + len(reply)] = torch.tensor(list(reply), dtype=ids.dtype)
    ids = ids.to(backbone.device)
    model: Any = backbone.model
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    logits = model(input_ids=ids, use_cache=False, **({"logits_to_keep": longest + 1} if keeps else {})).logits
    logits = logits[:, -longest - 1 : -1].float()
    target = ids[:, -longest:].unsqueeze(-1)
    nats = logits.logsumexp(-1) - logits.gather(-1, target).squeeze(-1)
    real = torch.arange(longest, device=ids.device) < lengths.unsqueeze(-1)
    total: list[float] = (nats * real).sum(-1).tolist()
    return total
