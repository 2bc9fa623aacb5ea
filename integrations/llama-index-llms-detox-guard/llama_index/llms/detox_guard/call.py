"""One guarded answer under way: its policy, what is in force for it, its report. Knows no synthesizer and no node."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.llms.detox_guard.events import DetoxInterventionEvent, dispatcher
from llama_index.llms.detox_guard.llm import DetoxiGenLLM
from llama_index.llms.detox_guard.options import Scope, current_scope
from llama_index.llms.detox_guard.screening import Action

import detox_guard
from detox_guard import InvalidParamsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llama_index.core.base.llms.types import ChatMessage
    from llama_index.core.llms import LLM
    from llama_index.core.schema import NodeWithScore

__all__ = ["Call", "asked_llm", "check_options", "is_ours", "policy_in_force", "texts_of"]


def policy_in_force(llm: LLM, policy: detox_guard.GuardPolicy | None) -> detox_guard.GuardPolicy:
    """`policy`; or else the guard of `detox_options`, the LLM or its model, which this loads; or else the default."""
    if policy is not None:
        return policy
    options, llm = current_scope().options, asked_llm(llm)
    if isinstance(llm, DetoxiGenLLM):
        options = {"guard": llm.load().params.guard, **llm.decoding, **options}
    return options.get("guard") or detox_guard.GuardPolicy()


@dataclass
class Call:
    """One answer under way: what is in force for it, and what was done. `report` grows until its stream ends."""

    scope: Scope
    policy: detox_guard.GuardPolicy
    report: dict[str, Any]
    sources: list[NodeWithScore] = field(default_factory=list)
    replies: list[detox_guard.Generation] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return bool(self.report["guard"] == "hold")

    def note(self, taken: detox_guard.Intervention) -> None:
        """A unit that was held back."""
        dispatcher.event(DetoxInterventionEvent(where="hold", score=taken.score, action=taken.action))
        self.report["interventions"].append(_figures("hold", taken))

    def finish(self) -> None:
        """The LLM is done: what its own guard did."""
        for reply in self.replies:
            self.report["interventions"] += [_figures("decode", taken) for taken in reply.interventions]
            self.report["discarded_tokens"] += reply.usage.discarded_tokens
        self.replies.clear()


def _figures(where: str, taken: detox_guard.Intervention) -> dict[str, Any]:
    figures = {"where": where, "score": taken.score, "action": taken.action}
    return figures if where == "hold" else {**figures, "alpha": taken.alpha, "next_alpha": taken.next_alpha}


def texts_of(messages: Sequence[ChatMessage]) -> list[str]:
    return [message.content for message in messages if message.content]


def check_options(
    *,
    policy: Any = None,
    context: Any = "mask",
    context_threshold: Any = None,
    toxic_context_alpha: Any = 6.0,
    redact_sources: Any = True,
    **unknown: Any,
) -> None:
    """Raises `InvalidParamsError` for an option that `DetoxSynthesizer` does not take."""
    for name, value in unknown.items():
        raise InvalidParamsError(name, value, "no option of DetoxSynthesizer")
    if policy is not None and not isinstance(policy, detox_guard.GuardPolicy):
        raise InvalidParamsError("policy", policy, "a GuardPolicy or None")
    if context is not None and context not in get_args(Action):
        raise InvalidParamsError("context", context, f"None or one of {', '.join(get_args(Action))}")
    _check_number("context_threshold", 0.0 if context_threshold is None else context_threshold, 1)
    _check_number("toxic_context_alpha", toxic_context_alpha, 100)
    if not isinstance(redact_sources, bool):
        raise InvalidParamsError("redact_sources", redact_sources, "True or False")


def _check_number(name: str, value: Any, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise InvalidParamsError(name, value, f"a number from 0 to {most:g}")


def is_ours(llm: LLM) -> bool:
    return isinstance(asked_llm(llm), DetoxiGenLLM)


def asked_llm(llm: LLM) -> LLM:
    return llm.llm if isinstance(llm, StructuredLLM) else llm
