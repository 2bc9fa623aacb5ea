"""For the tests of the response-synthesis hook: its modes, and how it is asked."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from llama_index.core.bridge.pydantic import BaseModel, Field
from llama_index.core.response_synthesizers import BaseSynthesizer, ResponseMode
from llama_index.llms.detox_guard import (
    DetoxSynthesizer,
    get_detox_response_synthesizer,
)
from llama_index_harness import POLICY, QUERY, nodes

from detox_guard import GuardPolicy, Intervention
from detox_guard.testing import ScriptedScorer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llama_index.core.llms import LLM


CONTEXT = ["The library opens at nine.", "It closes at six. What a stupid building."]


MODES = list(ResponseMode)


ASK_NOTHING = (ResponseMode.NO_TEXT, ResponseMode.CONTEXT_ONLY)


ACCUMULATES = (ResponseMode.ACCUMULATE, ResponseMode.COMPACT_ACCUMULATE)


STRICT = GuardPolicy(scorer=ScriptedScorer("stupid", "library"), on_exhausted="raise")


REWIND = Intervention(unit=0, start=0, tokens=3, score=0.9, threshold=0.5, alpha=2.0, next_alpha=3.0, action="rewind")


async def answered(
    synthesizer: BaseSynthesizer, *, is_async: bool, context: Sequence[str] = CONTEXT, **kwargs: Any
) -> tuple[str, Any]:
    """The answer's text, its stream read to the end, and the response."""
    if is_async:
        response = await synthesizer.asynthesize(QUERY, nodes(*context), **kwargs)
    else:
        response = synthesizer.synthesize(QUERY, nodes(*context), **kwargs)
    stream = getattr(response, "response_gen", None)
    if stream is None:
        return str(response.response), response
    if hasattr(stream, "__aiter__"):
        return "".join([delta async for delta in stream]), response
    return "".join(stream), response


def synthesizer_for(llm: LLM, **options: Any) -> DetoxSynthesizer:
    options.setdefault("policy", POLICY)
    return get_detox_response_synthesizer(llm, **options)


class Opening(BaseModel):
    """When it opens."""

    hour: int
    remarks: list[str]
    day: str = Field(default="Monday", pattern="^(Mon|Tues)day$")


def opening(*remarks: str, day: str = "Monday") -> str:
    return json.dumps({"hour": 9, "remarks": list(remarks), "day": day})
