"""The one exception tree of the package. Knows nothing of models or text.

::

    DetoxGuardError                      has .hint (what to do) and .retryable (may the same call work later?)
    ├── InvalidParamsError (ValueError)  a parameter is out of bounds: .field .value .bound
    ├── PromptError                      the prompt or messages cannot be used: .field .value .bound
    │   └── PromptTooLongError           more positions asked for than the backbone or the engine has
    ├── BackboneError                    the model cannot be served
    │   ├── BackboneNotFoundError        no such folder, file, hub id, or cached copy
    │   └── UnsupportedBackboneError     loaded, but not of a kind that can be steered (encoder-decoder, state space, …)
    ├── DetoxifierError                  the soft prompt cannot be used
    │   ├── DetoxifierNotFoundError      no such folder or hub id
    │   ├── DetoxifierFormatError        unreadable, wrong PEFT type, wrong dtype, NaN
    │   └── DetoxifierMismatchError      for another base model, or of another width
    ├── EngineError                      a request failed while it ran
    │   ├── EngineBusyError              the queue is full (retryable)
    │   ├── EngineClosedError            the engine was closed
    │   ├── RequestCancelledError        the caller cancelled
    │   └── StepError                    the forward pass failed or gave numbers that cannot be trusted (fail closed)
    ├── GuardError                       the guard let nothing through, and its policy says to raise
    ├── IncompleteAnswerError            a structured answer or a forced call was cut off, or ended by a guard
    ├── ScorerError                      a toxicity scorer cannot be loaded, is too slow, or gave what is no score
    ├── NotPicklableError (PicklingError) an object of one process (engine, scorer, hook) was to go to another
    └── DataError                        a training or evaluation file cannot be used
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

__all__ = [
    "BackboneError",
    "BackboneNotFoundError",
    "DataError",
    "DetoxGuardError",
    "DetoxifierError",
    "DetoxifierFormatError",
    "DetoxifierMismatchError",
    "DetoxifierNotFoundError",
    "EngineBusyError",
    "EngineClosedError",
    "EngineError",
    "GuardError",
    "IncompleteAnswerError",
    "InvalidParamsError",
    "NotPicklableError",
    "PromptError",
    "PromptTooLongError",
    "RequestCancelledError",
    "ScorerError",
    "StepError",
    "UnsupportedBackboneError",
]


class DetoxGuardError(Exception):
    """Root of every error this package raises on purpose. Each can be pickled, so it crosses processes as itself."""

    retryable = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        return _revived, (type(self), self.args, self.portable_state())

    def portable_state(self) -> dict[str, Any]:
        """The attributes; one that cannot be pickled (a hook given as a value, say) as the start of its repr."""
        return {name: value if _can_pickle(value) else _short(value) for name, value in self.__dict__.items()}


class _FieldError(DetoxGuardError):
    """An input that names its field, its value (shortened) and the bound it breaks."""

    def __init__(self, field: str, value: object, bound: str, *, hint: str = "") -> None:
        self.field = field
        self.value = value
        self.bound = bound
        super().__init__(f"{field}: {_short(value)} is not allowed: {bound}", hint=hint)


class InvalidParamsError(_FieldError, ValueError):
    """A parameter is of the wrong type or out of bounds."""

    @classmethod
    def from_pydantic(cls, error: ValidationError) -> InvalidParamsError:
        """The first complaint of a pydantic error, as ours."""
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or str(error.title)
        return cls(field, first["input"], first["msg"])


class PromptError(_FieldError):
    """The prompt or the chat messages cannot be decoded from.

    No `ValueError`: frameworks take those for an answer that does not parse, and go on without one.
    """


class PromptTooLongError(PromptError):
    """Prompt, virtual tokens and new tokens together exceed what the backbone or the engine can hold."""


class BackboneError(DetoxGuardError):
    """The backbone cannot be served."""


class BackboneNotFoundError(BackboneError):
    """No such folder, file, hub id, or cached copy."""


class UnsupportedBackboneError(BackboneError):
    """The model is of a kind that cannot be steered."""


class DetoxifierError(DetoxGuardError):
    """The detoxifier cannot be used."""


class DetoxifierNotFoundError(DetoxifierError):
    """No such folder or hub id."""


class DetoxifierFormatError(DetoxifierError):
    """The files are unreadable or hold something that is no soft prompt."""


class DetoxifierMismatchError(DetoxifierError):
    """The soft prompt was trained for another backbone."""


class EngineError(DetoxGuardError):
    """A request failed while it ran."""


class EngineBusyError(EngineError):
    """The queue is full."""

    retryable = True


class EngineClosedError(EngineError):
    """The engine was closed before the request was done."""


class RequestCancelledError(EngineError):
    """The caller cancelled the request."""


class StepError(EngineError):
    """A decoding step failed; nothing was sampled from it."""


class GuardError(DetoxGuardError):
    """A unit of the reply, or the prompt, stayed over the guard's threshold."""


class IncompleteAnswerError(DetoxGuardError):
    """A structured answer or a tool call that did not come to its end, and so is none.

    `finish_reason`: "length" (cut off at the most new tokens) or "guard" (ended by the guard). `text` is what there is
    of it. No `ValueError`: frameworks go on after those as if nothing had been said.
    """

    def __init__(self, finish_reason: str, text: str = "", wanted: str = "the structured answer") -> None:
        why, hint = {
            "length": ("cut off", "raise max_new_tokens (LangChain: max_tokens)"),
            "guard": ("ended by the guard", "ask again, or another way"),
        }.get(finish_reason, ("not whole", ""))
        super().__init__(f"{wanted} was {why}: finish_reason is {finish_reason!r}", hint=hint)
        self.finish_reason = finish_reason
        self.text = text


class ScorerError(DetoxGuardError):
    """A toxicity scorer cannot be loaded, did not answer in time, or returned something that is no score."""


class NotPicklableError(DetoxGuardError, pickle.PicklingError):
    """An engine, a scorer object or a hook belongs to its process. A copy elsewhere would not guard alike."""


class DataError(DetoxGuardError):
    """A data file cannot be used."""


def _short(value: object, limit: int = 80) -> str:
    try:
        text = repr(value)
    except Exception:  # nested too deep, or an object whose own repr fails
        text = f"<{type(value).__name__}>"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _can_pickle(value: object) -> bool:
    try:
        pickle.dumps(value)
    except Exception:
        return False
    return True


def _revived(cls: type[DetoxGuardError], args: tuple[Any, ...], state: dict[str, Any]) -> DetoxGuardError:
    """The error as it was, without a second run of its constructor."""
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error
