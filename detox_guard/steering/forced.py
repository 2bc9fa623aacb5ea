"""The teacher-forced pass: given replies behind given contexts, by the frozen model and behind a soft prompt.

Training, evaluation and benchmarks share it. Knows tensors and where virtual tokens stand; knows no text. All layouts
give the logits that predict the reply's tokens. For the first of them that is the output at the token before, which
with position "reply" is the last virtual token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, cast

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.detoxifiers.card import Position

__all__ = [
    "Along",
    "Batch",
    "Contrast",
    "along",
    "both_logits",
    "contrast",
    "generator_logits",
    "make_batch",
    "padded",
    "pair_loss",
    "positions_of",
    "reply_logits",
    "reply_loss",
    "reply_nats",
    "rows_of",
    "to_device",
]

DPO_BETA = 0.5
_ROWS, _SLOTS = 32, 16_384


class Batch(TypedDict):
    """Contexts and the replies to them; a mask is 1 on real tokens.

    Contexts are padded on the left, replies on the right, int64. One context row may serve all reply rows.
    """

    context_ids: torch.Tensor  # [1 or rows, context_len], context_len may be 0
    context_mask: torch.Tensor
    reply_ids: torch.Tensor  # [rows, reply_len]
    reply_mask: torch.Tensor


def make_batch(
    contexts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], pad: int, device: torch.device | None = None
) -> Batch:
    """Token ids as a batch; one context for all replies, or one for each."""
    context_ids, context_mask = padded(contexts, pad, left=True)
    reply_ids, reply_mask = padded(replies, pad, left=False)
    batch = Batch(context_ids=context_ids, context_mask=context_mask, reply_ids=reply_ids, reply_mask=reply_mask)
    return batch if device is None else to_device(batch, device)


def padded(rows: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and their mask, both `[rows, longest]`."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        columns = slice(width - len(tokens), width) if left else slice(len(tokens))
        ids[row, columns] = torch.tensor(tokens, dtype=torch.long)
        mask[row, columns] = 1
    return ids, mask


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch there."""
    return cast("Batch", {name: cast("torch.Tensor", tensor).to(device) for name, tensor in batch.items()})


def rows_of(batch: Batch, rows: slice) -> Batch:
    """Some of its replies, with their contexts."""
    own = slice(None) if len(batch["context_ids"]) < len(batch["reply_ids"]) else rows
    return Batch(
        context_ids=batch["context_ids"][own],
        context_mask=batch["context_mask"][own],
        reply_ids=batch["reply_ids"][rows],
        reply_mask=batch["reply_mask"][rows],
    )


def reply_logits(model: Any, soft_prompt: torch.Tensor, batch: Batch, position: Position) -> torch.Tensor:
    """Logits [rows, reply_len, vocab] that predict `batch["reply_ids"]`, differentiable in `soft_prompt` [P, hidden].

    "front" is PEFT's layout, [virtual | context | reply] in one pass. "reply" is [context | virtual | reply]: attention
    being causal, nothing before the virtual tokens depends on them, so the context's K/V comes without a graph, and
    once for all rows when they share it.
    """
    if position == "front":
        return _behind_front(model, soft_prompt, batch)
    with torch.no_grad():
        past, _ = _prefill(model, batch)
    return _behind_context(model, soft_prompt, batch, past)


def generator_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Logits of the model itself, differentiable in its weights: [rows, reply_len, vocab]. Where no row has a context,
    the first token of a reply has none: [rows, reply_len - 1, vocab]."""
    return _after_context(model, batch, *_prefill(model, batch))


def both_logits(
    model: Any, soft_prompt: torch.Tensor, batch: Batch, position: Position
) -> tuple[torch.Tensor, torch.Tensor]:
    """The detoxifier's logits, as `reply_logits`, and those of the frozen generator, which have no graph; what both
    read is computed once. The latter are of the shape of `generator_logits`."""
    with torch.no_grad():
        past, first = _prefill(model, batch)
        generator = _after_context(model, batch, past, first)
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


@torch.inference_mode()
def reply_nats(model: Any, context: Sequence[int], replies: Sequence[Sequence[int]], pad: int) -> list[float]:
    """Nats of each reply behind one context of at least a token, summed over its tokens; 0 for an empty reply.

    The model's whole distribution at temperature 1, in float32, a few rows at a time.
    """
    longest = max(map(len, replies), default=0)
    if longest == 0:
        return [0.0] * len(replies)
    rows = max(1, min(_ROWS, _SLOTS // (len(context) + longest)))
    nats: list[float] = []
    for at in range(0, len(replies), rows):
        batch = make_batch([context], replies[at : at + rows], pad, model.device)
        ids = batch["reply_ids"]
        if not ids.shape[1]:
            nats += [0.0] * len(ids)
            continue
        log_p = generator_logits(model, batch).float().log_softmax(-1)
        nats += (-log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1) * batch["reply_mask"]).sum(-1).tolist()
    return nats


class Along(NamedTuple):
    """Detoxifier against generator at each token that both predict, `[rows, reply_len]`, or one less behind nothing."""

    log_ratio: torch.Tensor
    """log p_detox(x_t) - log p_gen(x_t), nats; meaningless where `counted` is 0."""
    divergence: torch.Tensor
    """KL(p_gen‖p_detox), nats."""
    counted: torch.Tensor
    """1 on real tokens that both predict."""


def along(detoxifier: torch.Tensor, generator: torch.Tensor, batch: Batch) -> Along:
    """Compare the logits of `both_logits` on the same batch; float32, differentiable in the former."""
    log_gen = generator.float().log_softmax(-1)
    log_detox = detoxifier[:, -log_gen.shape[1] :].float().log_softmax(-1)
    counted = batch["reply_mask"].float()
    if batch["context_ids"].shape[1]:
        counted = torch.cat([counted[:, :1] * batch["context_mask"][:, -1:], counted[:, 1:]], dim=1)
    ids = batch["reply_ids"][:, -log_gen.shape[1] :].unsqueeze(-1)
    return Along(
        (log_detox.gather(-1, ids) - log_gen.gather(-1, ids)).squeeze(-1),
        functional.kl_div(log_detox, log_gen, reduction="none", log_target=True).sum(-1),
        counted[:, -log_gen.shape[1] :],
    )


class Contrast(NamedTuple):
    """Detoxifier against frozen generator along given replies. Behind an empty context a reply's first token is left
    out: the generator has nothing to predict it from."""

    log_ratio: torch.Tensor
    """`[rows]` Σ_t log p_detox(x_t) - log p_gen(x_t): how much more the detoxifier expects this reply, nats."""
    divergence: torch.Tensor
    """Scalar: mean KL(p_gen‖p_detox), nats a token."""


def contrast(detoxifier: torch.Tensor, generator: torch.Tensor, batch: Batch) -> Contrast:
    """`along`, summed up."""
    log_ratio, divergence, counted = along(detoxifier, generator, batch)
    return Contrast((log_ratio * counted).sum(-1), (divergence * counted).sum() / counted.sum().clamp_min(1))


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


def _after_context(model: Any, batch: Batch, past: Any, first: torch.Tensor | None) -> torch.Tensor:
    """`past` and `first` as `_prefill` gives them; `past` is longer afterwards."""
    rows = len(batch["reply_ids"])
    mask = torch.cat([batch["context_mask"].expand(rows, -1), batch["reply_mask"]], dim=1)[:, :-1]
    inputs = batch["reply_ids"][:, :-1]
    if not inputs.shape[1]:
        return (
            inputs.new_zeros(rows, 0, model.config.vocab_size).float() if first is None else first.expand(rows, -1, -1)
        )
    logits: torch.Tensor = model(
        input_ids=inputs,
        attention_mask=mask,
        position_ids=positions_of(mask)[:, mask.shape[1] - inputs.shape[1] :],
        past_key_values=past,
        use_cache=past is not None,
    ).logits
    return logits if first is None else torch.cat([first.expand(rows, -1, -1), logits], dim=1)


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
