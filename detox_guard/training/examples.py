"""Batches of training examples: what the model reads first, and the reply whose tokens carry the loss.

Knows how text is laid out in tokens when it is served (plain prompts, chat template, retrieved passages). Knows no soft
prompt: where that stands is the business of `detox_guard.steering.forced`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from detox_guard.steering.forced import Batch, make_batch, rows_of, to_device

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from detox_guard.models.backbone import Backbone
    from detox_guard.training.data import Text

__all__ = ["KINDS", "Batch", "Examples", "Kind", "rows_of", "to_device"]

Kind = Literal["bare", "split", "chat", "passage"]
KINDS: tuple[Kind, ...] = get_args(Kind)

INSTRUCTIONS = (
    "What do you think about this?",
    "Write a reply to this comment.",
    "Tell me what you think of the people in the news today.",
    "Give me your honest opinion in a few sentences.",
    "How would you answer this?",
    "Summarize the text in your own words.",
    "Write a short comment for an online forum.",
    "Answer the question with the help of the text above. What happened, and why?",
    "Continue the conversation.",
    "Can you explain this to me?",
)
NEUTRAL_TEXTS = (
    "The museum opens at nine in the morning and closes at six in the evening, except on Mondays.",
    "The river rises in the northern hills and flows through two lakes before it reaches the sea.",
    "The committee met on Thursday to discuss the budget for the new library and the repair of the bridge.",
    "Bread dough should rest in a warm place until it has doubled in size, which takes about an hour.",
    "The company said that its new train will carry four hundred passengers between the two cities.",
    "Most birds of this family build their nests in trees, close to water, and lay two to four eggs.",
    "The course has twelve lessons, each with a short text, some questions and a list of new words.",
    "After the match the coach thanked both teams and said that the second half had been very close.",
)


@dataclass(frozen=True)
class Examples:
    """Makes batches of one kind from texts, alike for the same `rng`.

    "bare": nothing but the text; "split": the prompt, or the first half of the text, is the context; "chat": the text
    answers an instruction, or its own question, behind the chat template; "passage": it answers an instruction behind
    `passage_len` tokens of neutral text. What a text follows is never learned: in a "bare" batch it is the context, in
    front of a "passage" it is left out. Without a chat template the latter two are plain text. `max_context_len` cuts
    contexts on the left.
    """

    backbone: Backbone
    contexts: Sequence[str] = NEUTRAL_TEXTS
    reply_len: int = 40
    passage_len: tuple[int, int] = (300, 600)
    max_context_len: int | None = None

    def batch(self, kind: Kind, texts: Sequence[Text], rng: random.Random) -> Batch:
        """One batch of `texts`, each cut to `reply_len` tokens."""
        if kind == "split" or (kind == "bare" and not all(isinstance(text, str) for text in texts)):
            cut = _split if kind == "split" else lambda text: ("", text)
            halves = [cut(text) if isinstance(text, str) else (text.prompt, text.text) for text in texts]
            contexts = [self._ids(before) if before else [] for before, _ in halves]
            replies = [self._ids(after, special=False) for _, after in halves]
        else:
            contexts = [self._ids("") if kind == "bare" else self._chat(self._user_turn(kind, rng))]
            if kind == "chat" and not all(isinstance(text, str) for text in texts):
                contexts = [contexts[0] if isinstance(text, str) else self._chat(text.prompt) for text in texts]
            own = [text if isinstance(text, str) else text.text.lstrip() for text in texts]
            replies = [self._ids(text, special=False) for text in own]
        if self.max_context_len is not None:
            contexts = [ids[max(0, len(ids) - self.max_context_len) :] for ids in contexts]
        return make_batch(contexts, [ids[: self.reply_len] for ids in replies], self.backbone.pad_token_id)

    def _user_turn(self, kind: Kind, rng: random.Random) -> str:
        instruction = rng.choice(INSTRUCTIONS)
        if kind == "chat":
            return instruction if rng.random() < 0.5 else f"{rng.choice(self.contexts)}\n\n{instruction}"
        wanted = rng.randint(*self.passage_len)
        passage: list[str] = []
        while wanted > 0:
            passage.append(rng.choice(self.contexts))
            wanted -= len(self._ids(passage[-1], special=False)) or wanted
        return "\n\n".join([*passage, instruction])

    def _chat(self, user_turn: str) -> list[int]:
        if not self.backbone.has_chat_template:
            return self._ids(user_turn + "\n\n")
        rendered: str = self.backbone.tokenizer.apply_chat_template(
            [{"role": "user", "content": user_turn}], add_generation_prompt=True, tokenize=False
        )
        return self._ids(rendered, special=False)

    def _ids(self, text: str, *, special: bool = True) -> list[int]:
        return list(self.backbone.tokenizer(text, add_special_tokens=special)["input_ids"])


def _split(text: str) -> tuple[str, str]:
    """The text cut at the space nearest to its middle; all of it is reply when it has none. The space goes with the
    reply, as it does when a reply is decoded behind a prompt."""
    middle = len(text) // 2
    spaces = [place for place, char in enumerate(text) if char == " " and place]
    cut = min(spaces, key=lambda place: abs(place - middle), default=0)
    return text[:cut], text[cut:]
