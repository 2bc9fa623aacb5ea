"""What a guard is told to do. Knows bounds; knows no model, no text, no thread."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_serializer, field_validator
from pydantic_core import PydanticSerializationError

from detox_guard.checked import Checked
from detox_guard.errors import NotPicklableError

__all__ = ["GuardPolicy", "Rule", "Rung"]

Rule = Literal["bounded", "dexperts", "detoxigen"]
Alpha = Annotated[float, Field(ge=0, le=100)]


class Rung(Checked):
    """One step of the ladder: how a unit is decoded again. None keeps what the request asked for."""

    alpha: Alpha
    rule: Rule | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None


class GuardPolicy(Checked):
    """What is checked before it is released, and what happens to what fails.

    Text is released unit by unit. A unit is scored as its reader will see it: by itself, and together with the text
    before it; strings of JSON and of tool calls decoded, each by itself; content joined without the calls in it; a unit
    of more than twelve words clause by clause too (a clause counts where it is half-way from `threshold` to 1). The
    highest score counts. Raises `InvalidParamsError`.
    """

    scorer: Any = "embedded"
    """"embedded", "minilm", a Hugging Face classifier (`load_scorer`), or any `ToxicityScorer`. One that fails, or is
    too slow, fails the request."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Up to and including this score a unit is released."""
    unit: Literal["sentence"] | Annotated[int, Field(ge=1, le=1024)] = "sentence"
    """What is released at once: a sentence, or so many tokens (cut at the next word)."""
    max_unit_tokens: Annotated[int, Field(ge=1, le=1024)] = 48
    """A sentence of more tokens is released in pieces."""
    context_chars: Annotated[int, Field(ge=0, le=100_000)] = 200
    """So many characters of the reply before a unit are scored together with it."""
    ladder: Annotated[tuple[Rung, ...], Field(max_length=32)] = (Rung(alpha=6.0), Rung(alpha=9.0))
    """How a flagged unit is decoded again: first on the first rung, and so on; the last one repeats. A number is an
    alpha. An alpha below the request's own does not lower it. The token at which the score first rose above the
    threshold is not chosen again."""
    max_rewinds: Annotated[int, Field(ge=0, le=100)] = 4
    """How often one unit is decoded again."""
    on_exhausted: Literal["replace", "stop", "raise"] = "replace"
    """What then happens: "replace" the unit and end the reply, "stop" before it, or "raise" `GuardError`. The finish
    reason of the first two is "guard"."""
    replacement: Annotated[str, Field(max_length=10_000)] = "[removed]"
    """What stands in the place of a unit that is replaced."""
    scan_input: bool = False
    """Score the prompt too, each message as a whole and sentence by sentence. A flagged one is answered by
    `on_exhausted` alone."""
    scorer_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 10.0
    """Seconds after which a scorer that has not answered fails the request (`ScorerError`)."""
    on_event: Callable[..., object] | None = None
    """Called with every `Intervention`, on the decoding thread: be quick. An exception in it is logged, no more."""
    audit_log: str | None = None
    """A file that gets every `Intervention` as a JSON line, rotated at 10 MB. A line that it does not take (full disk)
    goes to the logger "detox_guard.guard"."""
    keep_discarded: bool = False
    """Put text that was taken back into events and log."""

    @field_validator("scorer", mode="before")
    @classmethod
    def _scores(cls, value: object) -> object:
        if not ((isinstance(value, str) and value) or callable(getattr(value, "score", None))):
            raise ValueError("Input should be a name, or an object with .name and .score()")
        return value

    @field_validator("unit", mode="before")
    @classmethod
    def _sentence_or_tokens(cls, value: object) -> object:
        if value != "sentence" and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1024):
            raise ValueError('Input should be "sentence", or a number of tokens from 1 to 1024')
        return value

    @field_validator("ladder", mode="before")
    @classmethod
    def _rungs(cls, value: object) -> object:
        """Numbers are alphas; a list will do."""
        if not isinstance(value, list | tuple):
            return value
        return tuple(
            Rung(alpha=float(rung)) if isinstance(rung, int | float) and not isinstance(rung, bool) else rung
            for rung in value
        )

    @field_validator("threshold", "scorer_timeout_s", mode="before")
    @classmethod
    def _no_bool(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError("Input should be a number, not a bool")
        return value

    @field_serializer("scorer", "on_event", mode="wrap", when_used="json")
    def _by_name(self, value: Any, handler: SerializerFunctionWrapHandler) -> Any:
        """In JSON, as in a trace, an object stands there by its name; no policy is made of that again."""
        try:
            return handler(value)
        except PydanticSerializationError:
            name = getattr(value, "name", None) or getattr(value, "__qualname__", type(value).__qualname__)
            return {"object": str(name)}

    def __getstate__(self) -> dict[Any, Any]:
        """Raises `NotPicklableError` for a scorer object, or a hook that pickle cannot find by its name."""
        if not isinstance(self.scorer, str):
            name = getattr(self.scorer, "name", type(self.scorer).__name__)
            raise NotPicklableError(
                f"guard.scorer: {name!r} is an object of this process", hint="name a scorer, or build it over there"
            )
        try:
            pickle.dumps(self.on_event)
        except Exception as error:
            raise NotPicklableError(
                f"guard.on_event: the hook cannot be pickled: {error}", hint="use a function of a module"
            ) from error
        return super().__getstate__()

    @property
    def most_alpha(self) -> float:
        """The strongest alpha of the ladder."""
        return max((rung.alpha for rung in self.ladder), default=0.0)
