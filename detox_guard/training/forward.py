"""One differentiable forward pass of a frozen backbone with a soft prompt. Knows tensors only.

Both layouts give the logits that predict the reply's tokens; for the first of them that is the output at the token
before, which with position "reply" is the last virtual token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from detox_guard.detoxifier import Position
    from detox_guard.training.examples import Batch

__all__ = ["Contrast", "contrast", "pair_loss", "positions_of", "reply_logits", "reply_loss"]

DPO_BETA = 0.5


def reply_logits(model: Any, soft_prompt: torch.Tensor, batch: Batch, position: Position) -> torch.Tensor:
    """Logits [rows, reply_len, vocab] that predict `batch["reply_ids"]`, differentiable in `soft_prompt` [P, hidden].

    "front" is PEFT's layout, [virtual | context | reply] in one pass. "reply" is [context | virtual | reply]: attention
    being causal, nothing before the virtual tokens depends on them, so the context's K/V comes without a graph, and
    once for all rows when they share it.
    """
    embed = model.get_input_embeddings()
    context_ids, reply_ids = batch["context_ids"], batch["reply_ids"]
    rows, reply_len = reply_ids.shape
    virtual = soft_prompt.to(embed.weight.dtype).expand(rows, -1, -1)
    virtual_mask = reply_ids.new_ones(rows, len(soft_prompt))
    context_mask = batch["context_mask"].expand(rows, -1)
    past = None
    if position == "front":
        prefix = torch.cat([virtual, embed(context_ids).expand(rows, -1, -1)], dim=1)
        prefix_mask = torch.cat([virtual_mask, context_mask], dim=1)
        # padding to the very left: even behind an empty context, a reply follows a real token
        order = prefix_mask.argsort(dim=1, stable=True)
        prefix = prefix.gather(1, order.unsqueeze(-1).expand_as(prefix))
        inputs = torch.cat([prefix, embed(reply_ids)], dim=1)
        mask = torch.cat([prefix_mask.gather(1, order), batch["reply_mask"]], dim=1)
    else:
        past, _ = _prefill(model, batch)
        inputs = torch.cat([virtual, embed(reply_ids)], dim=1)
        mask = torch.cat([context_mask, virtual_mask, batch["reply_mask"]], dim=1)
    input_len = inputs.shape[1]
    outputs = model(
        inputs_embeds=inputs,
        attention_mask=mask,
        position_ids=positions_of(mask)[:, -input_len:],
        past_key_values=past,
        use_cache=past is not None,
        # the head is a fifth of a small model's cost: only where a reply token is predicted
        logits_to_keep=torch.arange(input_len - reply_len - 1, input_len - 1, device=inputs.device),
    )
    logits: torch.Tensor = outputs.logits
    return logits


def reply_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the reply's tokens under `logits` (of `reply_logits`), nats a token: float32, a scalar."""
    losses = functional.cross_entropy(logits.float().flatten(0, 1), batch["reply_ids"].flatten(), reduction="none")
    weights = batch["reply_mask"].flatten().float()
    return (losses * weights).sum() / weights.sum()


class Contrast(NamedTuple):
    """Detoxifier against frozen generator along given replies. Behind an empty context a reply's first token is left
    out: the generator has nothing to predict it from."""

    log_ratio: torch.Tensor
    """`[rows]` Σ_t log p_detox(x_t) - log p_gen(x_t): how much more the detoxifier expects this reply, nats."""
    divergence: torch.Tensor
    """Scalar: mean KL(p_gen‖p_detox), nats a token."""


def contrast(model: Any, logits: torch.Tensor, batch: Batch) -> Contrast:
    """Compare the detoxifier's `logits` (of `reply_logits`) with the generator's on the same batch; float32,
    differentiable in the former."""
    with torch.no_grad():
        log_gen = _generator_logits(model, batch).float().log_softmax(-1)
    log_detox = logits[:, -log_gen.shape[1] :].float().log_softmax(-1)
    weights = batch["reply_mask"].float()
    if batch["context_ids"].shape[1]:
        weights = torch.cat([weights[:, :1] * batch["context_mask"][:, -1:], weights[:, 1:]], dim=1)
    weights = weights[:, -log_gen.shape[1] :]
    ids = batch["reply_ids"][:, -log_gen.shape[1] :].unsqueeze(-1)
    gained = (log_detox.gather(-1, ids) - log_gen.gather(-1, ids)).squeeze(-1)
    divergence = functional.kl_div(log_detox, log_gen, reduction="none", log_target=True).sum(-1)
    return Contrast(
        (gained * weights).sum(-1),
        (divergence * weights).sum() / weights.sum().clamp_min(1),
    )


def pair_loss(toxic: torch.Tensor, neutral: torch.Tensor) -> torch.Tensor:
    """Direct preference optimization (Rafailov et al. 2023, eq. 7), the toxic text of each pair being preferred.

    `toxic`, `neutral` are `Contrast.log_ratio` of the two texts of `[pairs]`; a scalar. What both texts share cancels,
    so the soft prompt learns the words in which they differ.
    """
    return functional.softplus(-DPO_BETA * (toxic - neutral)).mean()


def _generator_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Logits of the frozen generator that predict the replies: [rows, reply_len, vocab], or [rows, reply_len - 1,
    vocab] of all but their first tokens where no row has a context."""
    rows = len(batch["reply_ids"])
    mask = torch.cat([batch["context_mask"].expand(rows, -1), batch["reply_mask"]], dim=1)[:, :-1]
    inputs = batch["reply_ids"][:, :-1]
    past, first = _prefill(model, batch)
    logits: torch.Tensor = model(
        input_ids=inputs,
        attention_mask=mask,
        position_ids=positions_of(mask)[:, mask.shape[1] - inputs.shape[1] :],
        past_key_values=past,
        use_cache=past is not None,
    ).logits
    return logits if first is None else torch.cat([first.expand(rows, -1, -1), logits], dim=1)


@torch.no_grad()
def _prefill(model: Any, batch: Batch) -> tuple[Any, torch.Tensor | None]:
    """The contexts' K/V, one row a reply, and the logits [1 or rows, 1, vocab] behind them; None without a context."""
    ids, mask = batch["context_ids"], batch["context_mask"]
    if ids.shape[1] == 0:
        return None, None
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=True, logits_to_keep=1)
    past = out.past_key_values
    if len(ids) == 1:
        past.batch_repeat_interleave(len(batch["reply_ids"]))
    return past, out.logits


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Position of each real token among the real tokens of its row; 0 on padding before them."""
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)
