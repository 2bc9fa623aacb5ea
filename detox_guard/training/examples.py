"""Batches of training examples: what the model reads first, and the reply whose tokens carry the loss.

Knows how text is laid out in tokens when it is served (plain prompts, chat template, retrieved passages), and which
rows each step sees. Knows no soft prompt: where that stands is the business of `detox_guard.steering.forced`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypedDict, TypeVar, get_args

from torch.utils.data import Dataset

from detox_guard.errors import InvalidParamsError
from detox_guard.steering.forced import Batch, make_batch, rows_of, to_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.models.backbone import Backbone
    from detox_guard.training.config import TrainingConfig
    from detox_guard.training.data import Text
    from detox_guard.training.rows import Pair

__all__ = [
    "KINDS",
    "Batch",
    "Examples",
    "Kind",
    "Step",
    "Steps",
    "make_examples",
    "pairs_for",
    "rows_in_batch",
    "rows_of",
    "texts_for",
    "to_device",
]

Row = TypeVar("Row")

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


def make_examples(config: TrainingConfig, backbone: Backbone, contexts: Sequence[str]) -> Examples:
    """The layouts that these settings ask for; without `contexts`, with a few neutral texts that are built in.

    Raises `InvalidParamsError` where the backbone has no positions for them.
    """
    room = None
    if backbone.max_positions is not None:
        room = backbone.max_positions - config.virtual_tokens - config.reply_tokens
        if room < 1:
            bound = f"virtual_tokens + reply_tokens must stay under the backbone's {backbone.max_positions} positions"
            raise InvalidParamsError("virtual_tokens", config.virtual_tokens, bound)
    return Examples(
        backbone,
        contexts=contexts or NEUTRAL_TEXTS,
        reply_len=config.reply_tokens,
        passage_len=config.passage_tokens,
        max_context_len=room,
    )


class Step(TypedDict):
    """What one training step sees: `toxic` toxic replies, then harmless ones in contexts of the same kind. The first
    `pairs` of both say the same, and which of them is preferred is learned."""

    batch: Batch
    toxic: int
    pairs: int


@dataclass(frozen=True)
class Steps(Dataset[Step]):
    """Item i is step i; a run that is resumed meets the batches it would have met."""

    examples: Examples
    texts: Sequence[Text]
    anchors: Sequence[Text]
    pairs: Sequence[Pair]
    config: TrainingConfig

    def __len__(self) -> int:
        return self.config.steps

    def __getitem__(self, step: int) -> Step:
        seed = f"{self.config.seed}/{step}"
        (kind,) = random.Random(seed).choices(KINDS, weights=self.config.mixture)
        rows = rows_in_batch(kind, self.config)
        paired = rows // 2 if self.pairs else 0
        own_pairs, own_texts, own_anchors = self._by_kind[kind]
        most = self.config.batch_size // 2 if self.pairs else 0
        alone = step * (self.config.batch_size - most)  # so that none is passed over
        pairs = _next(own_pairs, step * most, paired)
        toxic = [one for one, _ in pairs]
        toxic += _next(own_texts, alone, rows - paired)
        learned = paired if self.config.pair_weight > 0 else 0
        harmless: list[Text] = []
        if learned or self.config.anchor_weight > 0:
            harmless += [other for _, other in pairs]
            if self.anchors:
                harmless += _next(own_anchors, alone, rows - paired)
        # In one batch, so in the same contexts: or the soft prompt could tell the two by their contexts.
        batch = self.examples.batch(kind, toxic + harmless, random.Random(f"{seed}/{kind}"))
        return Step(batch=batch, toxic=len(toxic), pairs=learned)

    @cached_property
    def _by_kind(self) -> dict[Kind, tuple[Sequence[Pair], Sequence[Text], Sequence[Text]]]:
        """Pairs, toxic texts and anchors that each kind of batch is made for."""
        return {
            kind: (pairs_for(kind, self.pairs), texts_for(kind, self.texts), texts_for(kind, self.anchors))
            for kind in KINDS
        }


def texts_for(kind: Kind, texts: Sequence[Text]) -> Sequence[Text]:
    """Those that this kind of batch is made for: continuations behind their prompts, answers behind their questions,
    elsewhere texts by themselves. Where there are none, whatever there is, first of all what follows something."""
    return [texts[i] for i in _places_for(kind, texts)]


def pairs_for(kind: Kind, pairs: Sequence[Pair]) -> Sequence[Pair]:
    """As `texts_for`."""
    return [pairs[i] for i in _places_for(kind, [toxic for toxic, _ in pairs])]


def _places_for(kind: Kind, texts: Sequence[Text]) -> Sequence[int]:
    alone = [i for i, text in enumerate(texts) if isinstance(text, str)]
    if kind in ("bare", "passage"):
        return alone or range(len(texts))
    following = [(i, text.chat) for i, text in enumerate(texts) if not isinstance(text, str)]
    own = [i for i, chat in following if chat == (kind == "chat")]
    return own or [i for i, _ in following] or alone


def _next(rows: Sequence[Row], first: int, count: int) -> list[Row]:
    """`count` rows from place `first` on, over and over again."""
    return [rows[i % len(rows)] for i in range(first, first + count)]


def rows_in_batch(kind: Kind, config: TrainingConfig) -> int:
    """Toxic texts of one batch. In front of a passage the whole of it takes part in every row's graph: fewer rows."""
    return max(1, config.batch_size // 4) if kind == "passage" and config.position == "front" else config.batch_size
