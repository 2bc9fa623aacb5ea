"""Which steering streams are soft prompts: what measures one by a teacher-forced pass knows no texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detox_guard.detoxifiers.soft_prompt import Detoxifier
from detox_guard.errors import InvalidParamsError

if TYPE_CHECKING:
    from detox_guard.detoxifiers.soft_prompt import SteeringStream

__all__ = ["soft_prompt"]


def soft_prompt(stream: SteeringStream) -> Detoxifier:
    """The stream's soft prompt. Raises `InvalidParamsError` for a text."""
    if not isinstance(stream.detoxifier, Detoxifier):
        raise InvalidParamsError("detoxifier", stream.detoxifier, "a soft prompt")
    return stream.detoxifier
