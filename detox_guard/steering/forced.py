"""One differentiable forward pass of a frozen backbone with a soft prompt. Knows tensors only.

Both layouts give the logits that predict the reply's tokens; for the first of them that is the output at the token
before, which with position "reply" is the last virtual token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from detox_guard.detoxifiers.soft_prompt import Position
    from detox_guard.training.examples import Batch

__all__ = ["Contrast", "both_logits", "contrast", "pair_loss", "positions_of", "reply_logits", "reply_loss"]

DPO_BETA = 0.5


def reply_logits(model: Any, soft_prompt: torch.Tensor, batch: Batch, position: Position) -> torch.Tensor:
    """Logits [rows, reply_len, vocab] that predict `batch["reply_ids"]`, differentiable in `soft_prompt` [P, hidden].

    "front" is PEFT's layout, [virtual | context | reply] in one pass. "reply" is [context | virtual | reply]: attention
    being causal, nothing before the virtual tokens depends on them, so the context's K/V comes without a graph, and
    once for all rows when they share it.
    """
    if position == "front":
        return _behind_front(model, soft_prompt, batch)
    past, _ = _prefill(model, batch)
    return _behind_context(model, soft_prompt, batch, past)


def both_logits(
    model: Any, soft_prompt: torch.Tensor, batch: Batch, position: Position
) -> tuple[torch.Tensor, torch.Tensor]:
    """The detoxifier's logits, as `reply_logits`, and those of the frozen generator, which have no graph; what both
    read is computed once. Where no row has a context, the generator predicts all but the first token of each reply:
    [rows, reply_len - 1, vocab]."""
    past, first = _prefill(model, batch)
    generator = _generator_logits(model, batch, past, first)
    if position == "front":
        return _behind_front(model, soft_prompt, batch), generator
    if past is not None and batch["reply_ids"].shape[1] > 1:
        past.crop(1 - batch["reply_ids"].shape[1])  # what the generator read after the context
    return _behind_context(model, soft_prompt, batch, past), generator


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


def contrast(detoxifier: torch.Tensor, generator: torch.Tensor, batch: Batch) -> Contrast:
    """Compare the logits of `both_logits` on the same batch; float32, differentiable in the former."""
    log_gen = generator.float().log_softmax(-1)
    log_detox = detoxifier[:, -log_gen.shape[1] :].float().log_softmax(-1)
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


def _behind_front(model: Any, soft_prompt: torch.Tensor, batch: Batch) -> torch.Tensor:
    embed = model.get_input_embeddings()
    rows = len(batch["reply_ids"])
    virtual, virtual_mask = _virtual(embed, soft_prompt, batch)
    prefix = torch.cat([virtual, embed(batch["context_ids"]).expand(rows, -1, -1)], dim=1)
    prefix_mask = torch.cat([virtual_mask, batch["context_mask"].expand(rows, -1)], dim=1)
    # padding to the very left: even behind an empty context, a reply follows a real token
    order = prefix_mask.argsort(dim=1, stable=True)
    prefix = prefix.gather(1, order.unsqueeze(-1).expand_as(prefix))
    mask = torch.cat([prefix_mask.gather(1, order), batch["reply_mask"]], dim=1)
    return _predictions(model, torch.cat([prefix, embed(batch["reply_ids"])], dim=1), mask, batch, None)


def _behind_context(model: Any, soft_prompt: torch.Tensor, batch: Batch, past: Any) -> torch.Tensor:
    embed = model.get_input_embeddings()
    virtual, virtual_mask = _virtual(embed, soft_prompt, batch)
    context_mask = batch["context_mask"].expand(len(virtual), -1)
    mask = torch.cat([context_mask, virtual_mask, batch["reply_mask"]], dim=1)
    return _predictions(model, torch.cat([virtual, embed(batch["reply_ids"])], dim=1), mask, batch, past)


def _virtual(embed: Any, soft_prompt: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    rows = len(batch["reply_ids"])
    virtual = soft_prompt.to(embed.weight.dtype).expand(rows, -1, -1)
    return virtual, batch["reply_ids"].new_ones(rows, len(soft_prompt))


def _predictions(model: Any, inputs: torch.Tensor, mask: torch.Tensor, batch: Batch, past: Any) -> torch.Tensor:
    """Logits at the places of `inputs` [rows, input_len, hidden] that predict the reply at its end."""
    input_len, reply_len = inputs.shape[1], batch["reply_ids"].shape[1]
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


@torch.no_grad()
def _generator_logits(model: Any, batch: Batch, past: Any, first: torch.Tensor | None) -> torch.Tensor:
    """`past` and `first` as `_prefill` gives them; `past` is longer afterwards."""
    rows = len(batch["reply_ids"])
    mask = torch.cat([batch["context_mask"].expand(rows, -1), batch["reply_mask"]], dim=1)[:, :-1]
    inputs = batch["reply_ids"][:, :-1]
    if first is not None and not inputs.shape[1]:
        return first.expand(rows, -1, -1)
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
