"""What the package reports to LlamaIndex instrumentation. Knows numbers and names; never carries the text it judged."""

from __future__ import annotations

from typing import Literal

from llama_index.core.instrumentation.events import BaseEvent
from llama_index_instrumentation import get_dispatcher

__all__ = ["DetoxInterventionEvent", "DetoxScreeningEvent", "dispatcher"]

dispatcher = get_dispatcher("llama_index.llms.detox_guard")


class DetoxInterventionEvent(BaseEvent):
    """A guard judged a unit of the answer toxic and acted on it.

    `where`: "decode" (inside `DetoxiGenLLM`, which can rewind) or "hold" (around another LLM, which cannot).
    `alpha`, `next_alpha`: strength before and after; None where nothing was decoded again.
    """

    where: Literal["decode", "hold"]
    score: float
    action: str
    alpha: float | None = None
    next_alpha: float | None = None

    @classmethod
    def class_name(cls) -> str:
        return "DetoxInterventionEvent"


class DetoxScreeningEvent(BaseEvent):
    """A retrieved node was judged toxic on its way to the LLM. `action`: "drop", "mask" or "mark"."""

    node_id: str
    score: float
    action: str

    @classmethod
    def class_name(cls) -> str:
        return "DetoxScreeningEvent"
