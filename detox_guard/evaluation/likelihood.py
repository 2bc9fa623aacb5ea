"""How likely a language model finds a reply: the backbone itself, or any other as a judge. Knows no steering."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import DynamicCache

from detox_guard.errors import PromptTooLongError
from detox_guard.text.prompts import encode_prompt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.evaluation.prompts import Asked
    from detox_guard.models.backbone import Backbone

__all__ = ["BackboneJudge", "OtherModelJudge", "ReplyJudge", "prefix_kv", "reply_nll", "tail_log_probs"]

LayerKV = list[tuple[torch.Tensor, torch.Tensor]]
_ROWS, _SLOTS = 32, 16_384


class ReplyJudge(Protocol):
    """Gives `(nats, tokens)` of each reply to one prompt, in its own tokens."""

    @property
    def name(self) -> str:
        """For the results."""

    def judge(self, prompt: Asked, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> list[tuple[float, int]]:
        """`texts` are the replies, `ids` the same as the backbone decoded them."""


@dataclass(frozen=True)
class BackboneJudge:
    """The plain backbone, on the very tokens that were decoded and the prompt as the plain method reads it."""

    backbone: Backbone
    name: str = "backbone"

    def judge(self, prompt: Asked, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> list[tuple[float, int]]:
        nats = reply_nll(self.backbone, encode_prompt(self.backbone, prompt), ids)
        return list(zip(nats, map(len, ids), strict=True))


@dataclass(frozen=True)
class OtherModelJudge:
    """Another causal model: prompt and reply in its own tokens, chat through its own template or else as plain text."""

    backbone: Backbone

    @property
    def name(self) -> str:
        return f"lm:{self.backbone.id}"

    @property
    def fingerprint(self) -> str:
        """Models of one name are told apart by it."""
        return " ".join(map(str, self.backbone.identity.values()))

    def judge(self, prompt: Asked, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> list[tuple[float, int]]:
        if not isinstance(prompt, str) and not self.backbone.has_chat_template:
            prompt = "\n\n".join(str(message["content"]) for message in prompt) + "\n\n"
        own = [list(self.backbone.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        nats = reply_nll(self.backbone, encode_prompt(self.backbone, prompt), own)
        return list(zip(nats, map(len, own), strict=True))


@torch.inference_mode()
def reply_nll(backbone: Backbone, prompt_ids: Sequence[int], replies: Sequence[Sequence[int]]) -> list[float]:
    """Nats of each reply given the prompt, summed over its tokens; 0 for an empty reply.

    The model's whole distribution at temperature 1, in float32. The prompt is computed once for all replies.
    Raises `PromptTooLongError` where the model has no positions for prompt and reply.
    """
    longest = max(map(len, replies), default=0)
    if longest == 0:
        return [0.0] * len(replies)
    length = len(prompt_ids) + longest
    if backbone.learned_positions and backbone.max_positions and length > backbone.max_positions:
        raise PromptTooLongError("prompt", f"{len(prompt_ids)} + {longest}", f"at most {backbone.max_positions} tokens")
    embed = backbone.model.get_input_embeddings()
    *head, last = prompt_ids
    prefix = prefix_kv(backbone, embed(torch.tensor([head], dtype=torch.long, device=backbone.device)))
    rows = max(1, min(_ROWS, _SLOTS // length))
    nats: list[float] = []
    for at in range(0, len(replies), rows):
        some = replies[at : at + rows]
        # Padding stands behind the replies, where causal attention hides it.
        ids = torch.full((len(some), 1 + longest), backbone.pad_token_id)
        for row, reply in enumerate(some):
            ids[row, : 1 + len(reply)] = torch.tensor([last, *reply])
        ids = ids.to(backbone.device)
        log_p = tail_log_probs(backbone, prefix, embed(ids), 1 + longest).gather(-1, ids[:, 1:, None]).squeeze(-1)
        lengths = torch.tensor([len(reply) for reply in some], device=ids.device)
        real = torch.arange(longest, device=ids.device) < lengths.unsqueeze(-1)
        nats += (-log_p * real).sum(-1).tolist()
    return nats


def prefix_kv(backbone: Backbone, head: torch.Tensor) -> LayerKV:
    """Each layer's keys and values of `head [1, n, hidden]`; none for an empty one."""
    if not head.shape[1]:
        return []
    model: Any = backbone.model
    cache = DynamicCache()
    model.base_model(inputs_embeds=head, past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


def tail_log_probs(backbone: Backbone, prefix: LayerKV, tail: torch.Tensor, keep: int) -> torch.Tensor:
    """Log-probabilities `[rows, keep - 1, vocab]` at the last `keep` inputs but one of `tail [rows, m, hidden]`, all
    rows behind one prefix. Padding is at the right, where causal attention hides it."""
    model: Any = backbone.model
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(prefix):
        cache.update(keys.expand(len(tail), -1, -1, -1), values.expand(len(tail), -1, -1, -1), layer)
    logits = model(inputs_embeds=tail, past_key_values=cache, use_cache=True).logits
    log_probs: torch.Tensor = logits[:, -keep:-1].float().log_softmax(-1)
    return log_probs
