"""How likely a language model finds a reply: the backbone itself, or any other as a judge. Knows no steering."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from detox_guard.engine.backends import runner_of
from detox_guard.engine.likelihood import forced_nats
from detox_guard.errors import PromptTooLongError
from detox_guard.settings import EngineConfig
from detox_guard.steering.forced import reply_nats
from detox_guard.text.prompts import encode_prompt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.engine.runner import Runner
    from detox_guard.evaluation.prompts import Asked
    from detox_guard.models.backbone import Backbone

__all__ = ["LMJudge", "reply_nll"]


@dataclass(frozen=True)
class LMJudge:
    """A causal model. The plain backbone (`own`) reads the very tokens that were decoded. Another model reads prompt
    and reply in its own tokens, chat through its own template or else as plain text."""

    backbone: Backbone
    own: bool = False

    @property
    def name(self) -> str:
        """For the results."""
        return "backbone" if self.own else f"lm:{self.backbone.id}"

    @property
    def fingerprint(self) -> str | None:
        """Models of one name are told apart by it; the backbone is the run's."""
        return None if self.own else " ".join(map(str, self.backbone.identity.values()))

    def judge(self, prompt: Asked, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> list[tuple[float, int]]:
        """`(nats, tokens)` of each reply to one prompt; `ids` are `texts` as the backbone decoded them."""
        if not self.own:
            ids = [list(self.backbone.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
            if not isinstance(prompt, str) and not self.backbone.has_chat_template:
                prompt = "\n\n".join(str(message["content"]) for message in prompt) + "\n\n"
        prompt_ids = encode_prompt(self.backbone, prompt)
        if self.backbone.gguf is None:
            nats = reply_nll(self.backbone, prompt_ids, ids)
        else:
            _check_room(self.backbone, prompt_ids, ids)
            nats = forced_nats(self._runner, prompt_ids, ids)
        return list(zip(nats, map(len, ids), strict=True))

    @cached_property
    def _runner(self) -> Runner:
        """Of a model that torch has no weights of; closed when nobody holds the judge any more."""
        runner = runner_of(self.backbone, (), EngineConfig())
        weakref.finalize(self, runner.close)
        return runner


def reply_nll(backbone: Backbone, prompt_ids: Sequence[int], replies: Sequence[Sequence[int]]) -> list[float]:
    """Nats of each reply given the prompt, summed over its tokens; 0 for an empty reply.

    Raises `PromptTooLongError` where the model has no positions for prompt and reply.
    """
    _check_room(backbone, prompt_ids, replies)
    return reply_nats(backbone.model, prompt_ids, replies, backbone.pad_token_id)


def _check_room(backbone: Backbone, prompt_ids: Sequence[int], replies: Sequence[Sequence[int]]) -> None:
    longest = max(map(len, replies), default=0)
    length, hard = len(prompt_ids) + longest, backbone.learned_positions or backbone.gguf is not None
    if longest and hard and backbone.max_positions and length > backbone.max_positions:
        raise PromptTooLongError("prompt", f"{len(prompt_ids)} + {longest}", f"at most {backbone.max_positions} tokens")
