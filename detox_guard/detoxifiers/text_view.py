"""Texts as detoxifiers: no training, any model. Knows tokenizers; knows no engine, no measurement but the chosen one.

A text that asks for, or announces, toxic text makes the model expect it; steering away from that view takes it out of
the reply. A text that announces kind words does the opposite as an expert. The idea is that of self-debiasing (Schick
et al. 2021), ROSE (Zhong et al. 2024, arXiv 2402.11889) and ACD (Zhao et al. 2024, arXiv 2406.16743).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from detox_guard.detoxifiers.base import Place, TokenPrefix
from detox_guard.errors import DetoxifierError, DetoxifierMismatchError, InvalidParamsError

if TYPE_CHECKING:
    from detox_guard.models.backbone import Backbone

__all__ = ["TextView"]

_MOST_TAIL = 4096


@dataclass(frozen=True)
class TextView:
    """A text that one view of the model reads besides the context. It belongs to no base model.

    `place`: "front" is before everything. "reply" is between the context and the reply, followed by the last `tail`
    tokens of the context once more. "system" is a system message (added to the prompt's own, if it has one), and text
    before a plain prompt; such a view reads a context of its own, so the prompt is computed twice and kept twice.
    Raises `InvalidParamsError`.
    """

    text: str
    place: Place = "front"
    tail: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip():
            raise InvalidParamsError("text", self.text, "a text that is not empty")
        try:
            self.text.encode()
        except UnicodeEncodeError:
            raise InvalidParamsError("text", self.text, "text that can be written as UTF-8") from None
        if self.place not in get_args(Place):
            raise InvalidParamsError("place", self.place, f"one of {', '.join(get_args(Place))}")
        whole = isinstance(self.tail, int) and not isinstance(self.tail, bool)
        if not whole or not 0 <= self.tail <= _MOST_TAIL or (self.tail and self.place != "reply"):
            raise InvalidParamsError("tail", self.tail, f'a number of tokens up to {_MOST_TAIL}, for place "reply"')

    @property
    def sha256(self) -> str:
        """Hex digest of the text and where it stands."""
        return hashlib.sha256(f"{self.place} {self.tail} {self.text}".encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """What it is, as JSON."""
        return {"sha256": self.sha256, "position": self.place, "text": self.text, "tail": self.tail}

    def validate(self, backbone: Backbone) -> None:
        """Raise `DetoxifierError` where this text is none for `backbone`."""
        ids, most = self._ids(backbone), backbone.max_positions
        if not ids:
            raise DetoxifierError(f"{self.text!r}: the tokenizer of {backbone.id!r} makes no token of it")
        if max(ids) >= backbone.vocab_size:
            raise DetoxifierError(f"{self.text!r}: a token past the vocabulary of {backbone.id!r}")
        if most is not None and len(ids) + self.tail >= most:
            beside = len(ids) + self.tail
            raise DetoxifierMismatchError(f"{beside} tokens leave no room in the {most} positions of {backbone.id!r}")

    def view(self, backbone: Backbone, weight: float) -> TokenPrefix:
        """What the engine serves."""
        return TokenPrefix(tuple(self._ids(backbone)), weight, self.place, self.tail)

    def _ids(self, backbone: Backbone) -> list[int]:
        """Of the text. At the very front with the tokens that this model's texts begin with."""
        tokenizer = backbone.tokenizer
        ids: list[int] = tokenizer(self.text, add_special_tokens=False)["input_ids"]
        if self.place == "front":
            whole: list[int] = tokenizer(self.text)["input_ids"]
            starts = next((at for at in range(len(whole)) if whole[at : at + len(ids)] == ids), 0)
            ids = whole[: starts + len(ids)] if ids else ids
        return ids
