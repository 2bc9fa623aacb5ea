"""Guarded synthesizers and chat engines in one call. Knows how LlamaIndex builds them; judges nothing itself."""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from llama_index.core import Settings
from llama_index.core.bridge.pydantic import Field
from llama_index.core.chat_engine import CondensePlusContextChatEngine, CondenseQuestionChatEngine, ContextChatEngine
from llama_index.core.indices.prompt_helper import ChatPromptHelper, PromptHelper
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import ResponseMode, get_response_synthesizer
from llama_index.core.response_synthesizers.base import BaseSynthesizer
from llama_index.core.response_synthesizers.context_only import ContextOnly
from llama_index.core.response_synthesizers.no_text import NoText
from llama_index.llms.detox_guard.call import check_options, is_ours, policy_in_force, texts_of
from llama_index.llms.detox_guard.llm import DetoxiGenLLM
from llama_index.llms.detox_guard.options import Scope, current_scope, entered
from llama_index.llms.detox_guard.postprocessor import DetoxNodePostprocessor
from llama_index.llms.detox_guard.synthesizer import DetoxSynthesizer

import detox_guard
from detox_guard import InvalidParamsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llama_index.core.llms import LLM, ChatMessage
    from llama_index.core.schema import NodeWithScore, QueryBundle
    from llama_index.llms.detox_guard.screening import Action

__all__ = ["get_detox_response_synthesizer", "guard_chat_engine"]

_ASK_NO_LLM = {ResponseMode.NO_TEXT: NoText, ResponseMode.CONTEXT_ONLY: ContextOnly}
ChatEngine = TypeVar(
    "ChatEngine", bound="ContextChatEngine | CondensePlusContextChatEngine | CondenseQuestionChatEngine"
)


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
    """Guard a context, condense_plus_context or condense_question chat engine, in place.

    The options are those of `DetoxSynthesizer`. The question that a condensing engine has its LLM write is judged by
    the same policy as the answer, before it is searched for, logged or listed among the sources.

    The first two build a new synthesizer for every turn, and list their own nodes as sources: screening is therefore
    added as their last postprocessor, so that sources are what the LLM read. Without `policy` it is by the guard that
    `DetoxSynthesizer` then has in force. The third gets a copy of its query engine, with the hook as its synthesizer.
    Raises `InvalidParamsError` for a bad option, and for an engine that it cannot guard.
    """
    if not isinstance(engine, ContextChatEngine | CondensePlusContextChatEngine | CondenseQuestionChatEngine):
        bound = "a context, condense_plus_context or condense_question chat engine"
        raise InvalidParamsError("engine", engine, bound, hint="else give the guard to its DetoxiGenLLM")
    turns = _Turns(policy, options)
    check_options(policy=policy, **options)
    if isinstance(engine, CondenseQuestionChatEngine):
        asked = engine._query_engine
        if not isinstance(asked, RetrieverQueryEngine):
            raise InvalidParamsError("engine", asked, "one that asks a RetrieverQueryEngine")
        if not isinstance(asked._response_synthesizer, DetoxSynthesizer):
            engine._query_engine = asked = copy.copy(asked)
            asked._response_synthesizer = turns.hooked(asked._response_synthesizer)
    else:
        kept = [one for one in engine._node_postprocessors if not isinstance(one, _Screen)]
        action, threshold = options.get("context", "mask"), options.get("context_threshold")
        if action is not None:
            kept.append(_Screen(llm=engine._llm, policy=policy, action=action, context_threshold=threshold))
        engine._node_postprocessors = kept
    engine._detox_turns = turns  # type: ignore[union-attr]
    kind: Any = type(engine)
    if not hasattr(kind, "_detox_base"):
        engine.__class__ = _guarded(kind)
    return engine


@dataclass(frozen=True)
class _Turns:
    """How the turns of a chat engine are guarded."""

    policy: detox_guard.GuardPolicy | None
    options: dict[str, Any]

    def hooked(self, inner: BaseSynthesizer, history: Sequence[ChatMessage] = ()) -> DetoxSynthesizer:
        hook = DetoxSynthesizer(inner, policy=self.policy, **self.options)
        hook.history = history
        return hook

    def condensing(self, llm: LLM, texts: Sequence[str]) -> tuple[Scope, detox_guard.GuardPolicy, bool]:
        """What is in force while a question is written, its policy, and whether the LLM may read the turn at all."""
        policy, outer = policy_in_force(llm, self.policy), current_scope()
        if is_ours(llm):
            options = {**outer.options, "guard": policy}
            return Scope(options, (*outer.collectors, []), outer, outer.failures), policy, True
        from detox_guard import scan  # which loads torch

        may = not policy.scan_input or scan(texts, policy) <= policy.threshold
        return Scope(outer.options, (*outer.collectors, []), outer), policy, may


@functools.cache
def _guarded(base: Any) -> Any:
    """The class of chat engines with guarded turns. A class of its own, and no method of an object: copies keep it."""

    class Guarded(base):  # type: ignore[misc]
        _detox_turns: _Turns
        _detox_base = base

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            return _guarded_shell, (base,), self.__dict__

        def _get_response_synthesizer(
            self, chat_history: list[ChatMessage], *args: Any, **kwargs: Any
        ) -> DetoxSynthesizer:
            inner = super()._get_response_synthesizer(chat_history, *args, **kwargs)
            return self._detox_turns.hooked(inner, [*getattr(self, "_prefix_messages", ()), *chat_history])

        def _condense_question(self, chat_history: list[ChatMessage], message: str) -> str:
            scope, policy, may = self._detox_turns.condensing(self._llm, [message, *texts_of(chat_history)])
            if not may:  # the same texts are refused by the hook, in the turn's answer
                return message
            with entered(scope):
                question: str = super()._condense_question(chat_history, message)
            return _judged(question, message, scope, policy)

        async def _acondense_question(self, chat_history: list[ChatMessage], message: str) -> str:
            texts = [message, *texts_of(chat_history)]
            scope, policy, may = await asyncio.to_thread(self._detox_turns.condensing, self._llm, texts)
            if not may:
                return message
            with entered(scope):
                question: str = await super()._acondense_question(chat_history, message)
            return await asyncio.to_thread(_judged, question, message, scope, policy)

    Guarded.__name__ = Guarded.__qualname__ = f"Guarded{base.__name__}"
    return Guarded


def _guarded_shell(base: type) -> Any:
    """An empty engine of the guarded class: its state follows."""
    return object.__new__(_guarded(base))


def _judged(question: str, message: str, scope: Scope, policy: detox_guard.GuardPolicy) -> str:
    """The question, if the user wrote it or a `DetoxiGenLLM` decoded it under the policy; else what the policy lets
    through of it."""
    if question == message or scope.collectors[-1]:
        return question
    return "".join(detox_guard.guard_text([question], policy))


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
