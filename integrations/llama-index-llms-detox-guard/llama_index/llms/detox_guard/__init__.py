"""detox-guard for LlamaIndex: `DetoxiGenLLM` writes the answer, `DetoxSynthesizer` guards it whoever writes it."""

from __future__ import annotations

from llama_index.llms.detox_guard.callers import RefusedCallError
from llama_index.llms.detox_guard.evaluator import ToxicityEvaluator
from llama_index.llms.detox_guard.events import DetoxInterventionEvent, DetoxScreeningEvent
from llama_index.llms.detox_guard.factory import get_detox_response_synthesizer, guard_chat_engine
from llama_index.llms.detox_guard.llm import DetoxiGenLLM
from llama_index.llms.detox_guard.options import detox_options
from llama_index.llms.detox_guard.postprocessor import DetoxNodePostprocessor
from llama_index.llms.detox_guard.synthesizer import DetoxSynthesizer

from detox_guard import IncompleteAnswerError

__all__ = [
    "DetoxInterventionEvent",
    "DetoxNodePostprocessor",
    "DetoxScreeningEvent",
    "DetoxSynthesizer",
    "DetoxiGenLLM",
    "IncompleteAnswerError",
    "RefusedCallError",
    "ToxicityEvaluator",
    "detox_options",
    "get_detox_response_synthesizer",
    "guard_chat_engine",
]
