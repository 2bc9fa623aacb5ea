"""How likely a language model finds a reply: the backbone itself, or any other as a judge. Knows no steering."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from detox_guard.errors import PromptTooLongError
from detox_guard.text import encode_prompt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.backbone import Backbone
    from detox_guard.text import Prompt

__all__ = ["BackboneJudge", "OtherModelJudge", "ReplyJudge", "reply_nll"]

_ROWS = 32


class ReplyJudge(Protocol):
    """Gives `(nats, tokens)` of each reply to one prompt, in its own tokens."""

    @property
    def name(self) -> str:
        """For the results."""

    def judge(self, prompt: Prompt, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> list[tuple[float, int]]:
        """`texts` are the replies, `ids` the same as the backbone decoded them."""


@dataclass(frozen=True)
class BackboneJudge:
    """The plain backbone, on the very tokens that were decoded and the prompt as the plain method reads it."""

    backbone: Backbone
    name: str = "backbone"

    def judge(self, prompt: Prompt, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> list[tuple[float, int]]:
        nats = reply_nll(self.backbone, encode_prompt(self.backbone, prompt), ids)
        return list(zip(nats, map(len, ids), strict=True))


@dataclass(frozen=True)
class OtherModelJudge:
    """Another causal model: prompt and reply in its own tokens, chat through its own template or else as plain text."""

    backbone: Backbone

    @property
    def name(self) -> str:
        return f"lm:{self.backbone.id}"

    def judge(self, prompt: Prompt, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> list[tuple[float, int]]:
        if not isinstance(prompt, str) and not self.backbone.has_chat_template:
            prompt = "\n\n".join(str(message["content"]) for message in prompt) + "\n\n"
        own = [list(self.backbone.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        nats = reply_nll(self.backbone, encode_prompt(self.backbone, prompt), own)
        return list(zip(nats, map(len, own), strict=True))


@torch.inference_mode()
def reply_nll(backbone: Backbone, prompt_ids: Sequence[int], replies: Sequence[Sequence[int]]) -> list[float]:
    """Nats of each reply given the prompt, summed over its tokens; 0 for an empty reply.

    The model's whole distribution at temperature 1, in float32.
    """
    return [
        nats for at in range(0, len(replies), _ROWS) for nats in _nll(backbone, prompt_ids, replies[at : at + _ROWS])
    ]


def _nll(backbone: Backbone, prompt_ids: Sequence[int], replies: Sequence[Sequence[int]]) -> list[float]:
    longest = max(map(len, replies))
    if longest == 0:
        return [0.0] * len(replies)
    if backbone.learned_positions and backbone.max_positions and len(prompt_ids) + longest > backbone.max_positions:
        raise PromptTooLongError("prompt", f"{len(prompt_ids)} + {longest}", f"at most {backbone.max_positions} tokens")
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
