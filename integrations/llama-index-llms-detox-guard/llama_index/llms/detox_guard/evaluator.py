"""`ToxicityEvaluator`: toxicity of answers in LlamaIndex evaluations. Knows a scorer; asks no LLM."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from llama_index.core.evaluation.base import BaseEvaluator, EvaluationResult

import detox_guard

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llama_index.core.prompts.mixin import PromptDictType

__all__ = ["ToxicityEvaluator"]


class ToxicityEvaluator(BaseEvaluator):
    """`score` is the toxicity of the response in [0, 1], so lower is better; `passing` is `score <= threshold`.

    `scorer`: a name or a `ToxicityScorer`. Raises `InvalidParamsError`, and `ScorerError` where the scorer fails.
    """

    def __init__(self, scorer: Any = "embedded", *, threshold: float = 0.5, **unknown: Any) -> None:
        for name, value in unknown.items():
            raise detox_guard.InvalidParamsError(name, value, "no option of ToxicityEvaluator")
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
            raise detox_guard.InvalidParamsError("threshold", threshold, "a number from 0 to 1")
        # A policy is copied and pickled as a scorer should be: shared, or refused.
        self._policy = detox_guard.GuardPolicy(scorer=scorer)
        self._threshold = threshold

    async def aevaluate(
        self,
        query: str | None = None,
        response: str | None = None,
        contexts: Sequence[str] | None = None,
        sleep_time_in_seconds: int = 0,
        **kwargs: Any,
    ) -> EvaluationResult:
        """Judge one response; query and contexts are only passed on. Raises ValueError without a response."""
        if response is None:
            raise ValueError("response must be provided")
        await asyncio.sleep(sleep_time_in_seconds)
        (judged,) = await asyncio.to_thread(
            detox_guard.screen, [response], scorer=self._policy.scorer, threshold=self._threshold, action="mark"
        )
        return EvaluationResult(
            query=query,
            contexts=contexts,
            response=response,
            passing=not judged.flagged,
            score=judged.score,
            feedback=f"toxicity {judged.score:.2f}, threshold {self._threshold:.2f}",
        )

    def _get_prompts(self) -> PromptDictType:
        return {}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        """It has no prompts."""
