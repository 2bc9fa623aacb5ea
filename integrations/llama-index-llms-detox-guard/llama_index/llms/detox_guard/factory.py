"""Guarded synthesizers and chat engines in one call. Knows how LlamaIndex builds them; judges nothing itself."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, TypeVar

from llama_index.core import Settings
from llama_index.core.bridge.pydantic import Field
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine
from llama_index.core.indices.prompt_helper import ChatPromptHelper, PromptHelper
from llama_index.core.response_synthesizers import ResponseMode, get_response_synthesizer
from llama_index.core.response_synthesizers.base import BaseSynthesizer
from llama_index.core.response_synthesizers.context_only import ContextOnly
from llama_index.core.response_synthesizers.no_text import NoText
from llama_index.llms.detox_guard.llm import DetoxiGenLLM
from llama_index.llms.detox_guard.postprocessor import DetoxNodePostprocessor
from llama_index.llms.detox_guard.synthesizer import DetoxSynthesizer, policy_in_force

if TYPE_CHECKING:
    from llama_index.core.llms import LLM
    from llama_index.core.schema import NodeWithScore, QueryBundle
    from llama_index.llms.detox_guard.screening import Action

    import detox_guard

__all__ = ["get_detox_response_synthesizer", "guard_chat_engine"]

_ASK_NO_LLM = {ResponseMode.NO_TEXT: NoText, ResponseMode.CONTEXT_ONLY: ContextOnly}
ChatEngine = TypeVar("ChatEngine", ContextChatEngine, CondensePlusContextChatEngine)


def get_detox_response_synthesizer(
    llm: LLM | None = None,
    *,
    response_mode: ResponseMode | str = ResponseMode.COMPACT,
    policy: detox_guard.GuardPolicy | None = None,
    context: Action | None = "mask",
    context_threshold: float | None = None,
    toxic_context_alpha: float = 6.0,
    redact_sources: bool = True,
    **factory_options: Any,
) -> DetoxSynthesizer:
    """LlamaIndex's `get_response_synthesizer`, guarded: its options and those of `DetoxSynthesizer`.

    With a `DetoxiGenLLM`, prompts are packed by its own tokenizer.
    """
    llm = llm or Settings.llm
    if isinstance(llm, DetoxiGenLLM):
        packing: dict[str, Any] = {"llm_metadata": llm.metadata, "tokenizer": llm.encode}
        if factory_options.get("prompt_helper") is None:
            factory_options["prompt_helper"] = PromptHelper.from_llm_metadata(**packing)
        if factory_options.get("chat_prompt_helper") is None:
            factory_options["chat_prompt_helper"] = ChatPromptHelper.from_llm_metadata(**packing)
    mode = ResponseMode(response_mode)
    if mode in _ASK_NO_LLM:  # upstream's factory keeps the LLM from these, and they then want one from `Settings`
        taken = inspect.signature(BaseSynthesizer.__init__).parameters
        options = {name: value for name, value in factory_options.items() if name in taken}
        inner = _ASK_NO_LLM[mode](llm=llm, **options)
    else:
        inner = get_response_synthesizer(llm=llm, response_mode=mode, **factory_options)
    return DetoxSynthesizer(
        inner,
        policy=policy,
        context=context,
        context_threshold=context_threshold,
        toxic_context_alpha=toxic_context_alpha,
        redact_sources=redact_sources,
    )


def guard_chat_engine(
    engine: ChatEngine, *, policy: detox_guard.GuardPolicy | None = None, **options: Any
) -> ChatEngine:
    """Guard a context or condense_plus_context chat engine, in place; the options are those of `DetoxSynthesizer`.

    These engines build a new synthesizer for every turn, and list their own nodes as sources: screening is therefore
    added as their last postprocessor, so that sources are what the LLM read. Without `policy` it is by the guard that
    `DetoxSynthesizer` then has in force.
    """
    action, threshold = options.get("context", "mask"), options.get("context_threshold")
    if action is not None:
        screen = _Screen(llm=engine._llm, policy=policy, action=action, context_threshold=threshold)
        engine._node_postprocessors = [*engine._node_postprocessors, screen]
    build = engine._get_response_synthesizer

    def guarded(*args: Any, **kwargs: Any) -> DetoxSynthesizer:
        return DetoxSynthesizer(build(*args, **kwargs), policy=policy, **options)

    engine._get_response_synthesizer = guarded  # type: ignore[method-assign, assignment]
    return engine


class _Screen(DetoxNodePostprocessor):
    """Its scorer, and its threshold if none is given, are those of the policy in force when nodes come."""

    llm: Any = Field(exclude=True)
    policy: Any = Field(exclude=True)
    context_threshold: float | None = Field(ge=0, le=1)

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        policy = policy_in_force(self.llm, self.policy)
        threshold = policy.threshold if self.context_threshold is None else self.context_threshold
        by_policy = DetoxNodePostprocessor(action=self.action, threshold=threshold, scorer=policy.scorer)
        return by_policy._postprocess_nodes(nodes, query_bundle)
