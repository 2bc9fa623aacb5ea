"""Decoding options that reach an LLM through code that passes none: query engines, synthesizers, agents.

Knows the current context (thread or task); knows no LLM.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from detox_guard import DecodingParams

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from detox_guard import Generation

__all__ = ["Scope", "current_scope", "detox_options", "entered"]


@dataclass(frozen=True)
class Scope:
    """Options in force, and the lists that collect every reply decoded under them."""

    options: Mapping[str, Any] = field(default_factory=dict)
    collectors: tuple[list[Generation], ...] = ()


_scope: ContextVar[Scope | None] = ContextVar("detox_guard_llama_index_scope", default=None)


def current_scope() -> Scope:
    return _scope.get() or Scope()


@contextmanager
def entered(scope: Scope) -> Iterator[None]:
    """Put `scope` in force for the block."""
    token = _scope.set(scope)
    try:
        yield
    finally:
        _scope.reset(token)


@contextmanager
def detox_options(**options: Any) -> Iterator[list[Generation]]:
    """Options (fields of `DecodingParams`) of every `DetoxiGenLLM` call made inside the block, in this thread or task.

    Yields a list that receives each reply once it is complete. Inner blocks win over outer ones, and what a call
    passes itself wins over both::

        with detox_options(alpha=4.0, seed=7) as replies:
            query_engine.query("…")

    Raises `InvalidParamsError` for an unknown or bad option, on entering.
    """
    asked = DecodingParams(**options)
    options = {name: getattr(asked, name) for name in options}
    outer = current_scope()
    replies: list[Generation] = []
    with entered(Scope({**outer.options, **options}, (*outer.collectors, replies))):
        yield replies
