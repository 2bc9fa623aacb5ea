"""Which of LlamaIndex's own code asks, and errors that it does not swallow. Knows frames; knows no LLM."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from detox_guard import DetoxGuardError, InvalidParamsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["RefusedCallError", "asked_by_a_program", "refusals"]

_PROGRAMS = "llama_index.core.program."
_ON_THE_WAY = ("llama_index.core.llms.", "llama_index.core.instrumentation", "llama_index.core.callbacks")
_SWALLOW = tuple(
    f"llama_index.core.{name}"
    for name in (
        "chat_engine",
        "evaluation",
        "extractors",
        "indices",
        "node_parser",
        "postprocessor",
        "query_engine",
        "question_gen",
        "response_synthesizers",
        "retrievers",
        "selectors",
    )
)
"""Packages that take a `ValueError` for an answer that does not parse, and go on without one: "Empty Response"."""


class RefusedCallError(DetoxGuardError):
    """A call that LlamaIndex made has a bad parameter; `field`, `value` and `bound` as in its `InvalidParamsError`.

    Asked directly, the LLM raises that one. It is a `ValueError`, which LlamaIndex would swallow.
    """

    def __init__(self, cause: InvalidParamsError) -> None:
        super().__init__(str(cause), hint=cause.hint)
        self.field = cause.field
        self.value = cause.value
        self.bound = cause.bound


@contextmanager
def refusals(collectors: Sequence[list[DetoxGuardError]] = ()) -> Iterator[None]:
    """Turns an `InvalidParamsError` into a `RefusedCallError` where a caller would swallow it; collects our errors."""
    try:
        yield
    except DetoxGuardError as error:
        told: DetoxGuardError = error
        if isinstance(error, InvalidParamsError) and any(name.startswith(_SWALLOW) for name in _callers()):
            told = RefusedCallError(error)
        for collector in collectors:
            collector.append(told)
        if told is error:
            raise
        raise told from error


def asked_by_a_program() -> bool:
    """The nearest caller is a program of LlamaIndex's, which makes a structured answer of the reply."""
    ours = (name for name in _callers() if name.startswith("llama_index.core.") and not name.startswith(_ON_THE_WAY))
    return next(ours, "").startswith(_PROGRAMS)


def _callers() -> Iterator[str]:
    """Names of the modules on the stack, the nearest first."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_globals.get("__name__") or ""
        frame = frame.f_back  # type: ignore[assignment]
