"""Errors: ours stay ours, and are LangChain's too. Knows both trees of errors, and nothing else."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from detox_guard import (
    BackboneNotFoundError,
    DetoxGuardError,
    DetoxifierNotFoundError,
    EngineBusyError,
    EngineError,
    InvalidParamsError,
    PromptError,
    PromptTooLongError,
)
from langchain_core import exceptions

if TYPE_CHECKING:
    from collections.abc import Iterator


_THEIRS: tuple[tuple[type[DetoxGuardError], str], ...] = (
    (PromptTooLongError, "ContextOverflowError"),
    (InvalidParamsError, "ModelInvalidRequestError"),
    (PromptError, "ModelInvalidRequestError"),
    (BackboneNotFoundError, "ModelNotFoundError"),
    (DetoxifierNotFoundError, "ModelNotFoundError"),
    (EngineBusyError, "ModelRateLimitError"),
    (EngineError, "ModelError"),
)


@contextmanager
def langchain_errors() -> Iterator[None]:
    """Raise the core's errors so that `except ContextOverflowError` (or our own class) catches them."""
    try:
        yield
    except DetoxGuardError as error:
        raise as_langchain(error) from error


def as_langchain(error: DetoxGuardError) -> DetoxGuardError:
    """The same error, also of LangChain's class for it where this langchain-core has one."""
    for ours, name in _THEIRS:
        theirs = getattr(exceptions, name, None)  # some came late in 1.x
        if isinstance(error, ours) and theirs is not None:
            return error if isinstance(error, theirs) else _copied(error, _both(type(error), theirs))  # type: ignore[arg-type]
    return error


@cache
def _both(ours: type[Any], theirs: type[Any]) -> Any:
    def reduced(error: Any) -> tuple[Any, ...]:
        # No module has this class: over there it is made again.
        return as_langchain, (_copied(error, ours),)

    return type(ours.__name__, (ours, theirs), {"__module__": ours.__module__, "__reduce__": reduced})


def _copied(error: DetoxGuardError, kind: type[Any]) -> DetoxGuardError:
    twin: DetoxGuardError = kind.__new__(kind)  # type: ignore[call-overload]
    twin.args = error.args
    twin.__dict__.update(error.__dict__)
    return twin
