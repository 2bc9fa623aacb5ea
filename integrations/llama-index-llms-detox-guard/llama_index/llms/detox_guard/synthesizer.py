"""`DetoxSynthesizer`: the hook where LlamaIndex writes an answer from what it retrieved.

Knows synthesizers, nodes and answers of every shape; leaves judging to the core and rewinding to `DetoxiGenLLM`.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Generator
from contextlib import suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.response_synthesizers.base import BaseSynthesizer
from llama_index.core.response_synthesizers.context_only import ContextOnly
from llama_index.core.response_synthesizers.no_text import NoText
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.llms.detox_guard.call import Call, asked_llm, check_options, policy_in_force, texts_of
from llama_index.llms.detox_guard.llm import DetoxiGenLLM
from llama_index.llms.detox_guard.options import Scope, aheld, current_scope, entered, held, made_here
from llama_index.llms.detox_guard.rewriting import rewritten
from llama_index.llms.detox_guard.screening import MARK, Action, ScreenedNode, screen_nodes

import detox_guard

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llama_index.core.base.llms.types import ChatMessage
    from llama_index.core.base.response.schema import RESPONSE_TYPE
    from llama_index.core.prompts.mixin import PromptDictType, PromptMixinType
    from llama_index.core.schema import QueryBundle
    from llama_index.core.types import RESPONSE_TEXT_TYPE

__all__ = ["DetoxSynthesizer"]

REPORT = "detox"
"""Key of the report in a response's metadata."""
_ASK_NO_LLM = (NoText, ContextOnly)
_LLAMA_INDEX = "llama_index.core.response_synthesizers."


_call: ContextVar[Call | None] = ContextVar("detox_guard_llama_index_call", default=None)


class DetoxSynthesizer(BaseSynthesizer):
    """Any response synthesizer, guarded on the way in and on the way out.

    In: toxic nodes are dropped, masked or marked (`context`; None reads them as they are). If any was found and the
    LLM is a `DetoxiGenLLM`, it is steered with at least `toxic_context_alpha`. Out: a `DetoxiGenLLM` decodes under
    `policy` and can take a sentence back; around any other LLM, and around a synthesizer that is not LlamaIndex's own
    and may write by itself, each sentence is held until it is judged, then passed, replaced, or the answer stopped.
    Structured answers are judged string by string. With `scan_input` in the policy, a question (or what is read with
    it) that is flagged reaches no LLM, whoever were to answer. With `redact_sources`, `source_nodes` show toxic
    sentences masked, whatever the LLM read. `response.metadata["detox"]` says what was done: `screened`,
    `context_score`, `alpha` (if raised), `guard` ("decode" or "hold"), `interventions`, `discarded_tokens`; of a
    streamed answer the last two are complete when its stream is.
    Raises `GuardError` as `policy` asks, `ScorerError` where nothing can be judged.
    """

    def __init__(
        self,
        inner: BaseSynthesizer,
        *,
        policy: detox_guard.GuardPolicy | None = None,
        context: Action | None = "mask",
        context_threshold: float | None = None,
        toxic_context_alpha: float = 6.0,
        redact_sources: bool = True,
    ) -> None:
        """`policy`: None is the guard of `detox_options`, the `DetoxiGenLLM` or its model when asked, or the default.

        `context_threshold`: None is the threshold of the policy in force.
        """
        check_options(
            policy=policy,
            context=context,
            context_threshold=context_threshold,
            toxic_context_alpha=toxic_context_alpha,
            redact_sources=redact_sources,
        )
        self._inner = inner
        super().__init__(
            llm=inner._llm,
            callback_manager=inner._callback_manager,
            prompt_helper=inner._prompt_helper,
            chat_prompt_helper=inner._chat_prompt_helper,
            streaming=inner._streaming,
            output_cls=inner._output_cls,
            empty_response=inner._empty_response,
            multimodal=inner._multimodal,
        )
        self.history: Sequence[ChatMessage] = ()
        """Messages that the inner synthesizer's prompts begin with, as in a chat engine."""
        self._policy = policy
        self._context = context
        self._context_threshold = context_threshold
        self._toxic_context_alpha = toxic_context_alpha
        self._redact_sources = redact_sources

    @property
    def _streaming(self) -> bool:
        """Some chat engines switch it for a turn: the inner synthesizer is the one that streams."""
        return bool(self._inner._streaming)

    @_streaming.setter
    def _streaming(self, streaming: bool) -> None:
        self._inner._streaming = streaming

    # -- prompts are the inner synthesizer's, under the same names

    def _get_prompts(self) -> PromptDictType:
        return self._inner._get_prompts()

    def _update_prompts(self, prompts: PromptDictType) -> None:
        self._inner._update_prompts(prompts)

    def _get_prompt_modules(self) -> PromptMixinType:
        return self._inner._get_prompt_modules()

    # -- in: nodes

    def synthesize(
        self,
        query: str | QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """The guarded answer."""
        call, readable = self._open(nodes, additional_source_nodes or [])
        token = _call.set(call)
        try:
            return self._reported(super().synthesize(query, readable, None, **response_kwargs))
        finally:
            with suppress(ValueError):  # finished in another context, which has no part in this call
                _call.reset(token)

    async def asynthesize(
        self,
        query: str | QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """The guarded answer; the event loop is not blocked."""
        call, readable = await asyncio.to_thread(self._open, nodes, additional_source_nodes or [])
        token = _call.set(call)
        try:
            return self._reported(await super().asynthesize(query, readable, None, **response_kwargs))
        finally:
            with suppress(ValueError):  # finished in another context, which has no part in this call
                _call.reset(token)

    def _screen(self, nodes: Sequence[NodeWithScore], policy: detox_guard.GuardPolicy) -> list[ScreenedNode]:
        if self._context is None:
            return [ScreenedNode(node, node, node, 0.0, False) for node in nodes]
        threshold = policy.threshold if self._context_threshold is None else self._context_threshold
        return screen_nodes(nodes, scorer=policy.scorer, threshold=threshold, action=self._context)

    def _open(
        self, nodes: Sequence[NodeWithScore], additional: Sequence[NodeWithScore] = ()
    ) -> tuple[Call, list[NodeWithScore]]:
        """A new call, and the nodes that the LLM may read.

        A node that a postprocessor has marked counts as toxic, though what is left of it may not be.
        """
        policy = policy_in_force(self._llm, self._policy)
        screened, more = self._screen(nodes, policy), self._screen(additional, policy)
        marks = [node.retrieved.node.metadata.get(MARK) for node in screened]
        flagged = [node for node in screened if node.flagged]
        report: dict[str, Any] = {
            "screened": [
                {"node_id": node.retrieved.node_id, "score": round(node.score, 4), "action": self._context}
                for node in flagged
            ],
            "context_score": max((round(node.score, 4) for node in screened), default=0.0),
            "alpha": None,
            "interventions": [],
            "discarded_tokens": 0,
        }
        llm = asked_llm(self._llm)
        outer = current_scope()
        options: dict[str, Any] = {}
        replies: list[detox_guard.Generation] = []
        if ours := isinstance(llm, DetoxiGenLLM) and not isinstance(self._inner, _ASK_NO_LLM):
            options["guard"] = policy
            if (flagged or any(marks)) and llm.load().streams:
                options["alpha"] = report["alpha"] = max(llm.params.alpha, self._toxic_context_alpha)
                options["calm_share"] = 1.0  # what the model reads may have nothing toxic left
        report["guard"] = "decode" if ours and _only_asks(self._inner) else "hold"
        scope = Scope({**outer.options, **options}, (*outer.collectors, replies), outer, outer.failures)
        sources = [node.redacted if self._redact_sources else node.retrieved for node in (*screened, *more)]
        readable = [node.readable for node in screened if node.readable is not None]
        return Call(scope, policy, report, sources, replies), readable

    def _prepare_response_output(
        self, response_str: RESPONSE_TEXT_TYPE | None, source_nodes: list[NodeWithScore]
    ) -> RESPONSE_TYPE:
        call = _call.get()
        return super()._prepare_response_output(response_str, call.sources if call else source_nodes)

    def _reported(self, response: RESPONSE_TYPE) -> RESPONSE_TYPE:
        call = _call.get()
        assert call is not None
        response.metadata = {**(response.metadata or {}), REPORT: call.report}
        response.source_nodes = call.sources  # upstream lists none where no node was left to read
        return response

    # -- out: answers

    def get_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> RESPONSE_TEXT_TYPE:
        """The guarded answer from plain chunks."""
        call, chunks = self._opened(text_chunks)
        if self._is_refused(call, [query_str, *chunks]):
            return _one(self._refusal(call)) if self._streaming else self._refusal(call)
        return self._answer(call, lambda: self._inner.get_response(query_str, chunks, **response_kwargs))

    async def aget_response(
        self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """The guarded answer from plain chunks; the event loop is not blocked."""
        call, chunks = await asyncio.to_thread(self._opened, text_chunks)
        if await asyncio.to_thread(self._is_refused, call, [query_str, *chunks]):
            return _aone(self._refusal(call)) if self._streaming else self._refusal(call)
        with entered(call.scope):
            answer = await self._inner.aget_response(query_str, chunks, **response_kwargs)
        return await self._aguarded(call, answer)

    def get_response_from_messages(
        self, query_str: str, message_chunks: Sequence[ChatMessage], **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """The guarded answer of a multimodal synthesizer; its chunks are screened as nodes, in `synthesize`."""
        call, _ = self._opened([])
        if self._is_refused(call, [query_str, *texts_of(message_chunks)]):
            return _one(self._refusal(call)) if self._streaming else self._refusal(call)
        return self._answer(
            call, lambda: self._inner.get_response_from_messages(query_str, message_chunks, **response_kwargs)
        )

    async def aget_response_from_messages(
        self, query_str: str, message_chunks: Sequence[ChatMessage], **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """`get_response_from_messages` without blocking the event loop."""
        call, _ = await asyncio.to_thread(self._opened, [])
        if await asyncio.to_thread(self._is_refused, call, [query_str, *texts_of(message_chunks)]):
            return _aone(self._refusal(call)) if self._streaming else self._refusal(call)
        with entered(call.scope):
            answer = await self._inner.aget_response_from_messages(query_str, message_chunks, **response_kwargs)
        return await self._aguarded(call, answer)

    def _opened(self, text_chunks: Sequence[str]) -> tuple[Call, list[str]]:
        """The call under way and its chunks; or, asked without `synthesize`, a new one and its chunks screened."""
        call = _call.get()
        if call is not None:
            return call, list(text_chunks)
        call, readable = self._open([NodeWithScore(node=TextNode(text=chunk)) for chunk in text_chunks])
        return call, [node.node.get_content() for node in readable]

    def _is_refused(self, call: Call, texts: Sequence[str]) -> bool:
        """With `scan_input`: was any of what the LLM is to read flagged? A `DetoxiGenLLM` scans by itself.

        Raises `GuardError` as the policy says, and where a structured answer was to come.
        """
        policy = call.policy
        if not (policy.scan_input and call.holds) or isinstance(self._inner, _ASK_NO_LLM):
            return False
        from detox_guard import scan  # which loads torch

        score = scan([*texts_of(self.history), *texts], policy)
        if score <= policy.threshold:
            return False
        taken = detox_guard.Intervention(
            unit=-1, start=0, tokens=0, score=score, threshold=policy.threshold, alpha=0.0, next_alpha=None,
            action=policy.on_exhausted,
        )  # fmt: skip
        detox_guard.report_intervention(policy, taken, None)
        call.note(taken)
        if policy.on_exhausted == "raise" or self._output_cls is not None or isinstance(self._llm, StructuredLLM):
            raise detox_guard.GuardError(f"the prompt scored {score:.2f}, over {policy.threshold:g}")
        return True

    def _refusal(self, call: Call) -> str:
        return call.policy.replacement if call.policy.on_exhausted == "replace" else ""

    def _answer(self, call: Call, ask: Callable[[], RESPONSE_TEXT_TYPE]) -> RESPONSE_TEXT_TYPE:
        with entered(call.scope):
            answer = ask()
        if isinstance(answer, Generator):
            return self._stream(call, answer)
        return self._whole(call, answer)

    async def _aguarded(self, call: Call, answer: Any) -> RESPONSE_TEXT_TYPE:
        if isinstance(answer, AsyncGenerator):
            return self._astream(call, answer)
        if isinstance(answer, Generator):
            return self._stream(call, answer)
        return await asyncio.to_thread(self._whole, call, answer)

    def _stream(self, call: Call, answer: Generator[str, None, None]) -> Generator[str, None, None]:
        # Some synthesizers ask the LLM only while their stream is read: each step runs under the call's options.
        steps = held(call.scope, answer)
        try:
            yield from detox_guard.guard_text(steps, call.policy, call.note) if call.holds else steps
        finally:
            steps.close()
            call.finish()

    async def _astream(self, call: Call, answer: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
        steps = aheld(call.scope, answer)
        try:
            async for delta in detox_guard.aguard_text(steps, call.policy, call.note) if call.holds else steps:
                yield delta
        finally:
            await steps.aclose()
            call.finish()

    def _whole(self, call: Call, answer: RESPONSE_TEXT_TYPE) -> RESPONSE_TEXT_TYPE:
        if not call.replies:
            call.report["guard"] = "hold"  # whoever wrote it, no `DetoxiGenLLM` did
        call.finish()
        if not call.holds:
            return answer

        def judged(text: str) -> str:
            return "".join(detox_guard.guard_text([text], call.policy, call.note))

        if isinstance(answer, BaseModel):
            return rewritten(answer, judged)
        if isinstance(self._llm, StructuredLLM):
            return rewritten(self._llm.output_cls.model_validate_json(str(answer)), judged).model_dump_json()
        return judged(str(answer))


for _name in ("asynthesize", "aget_response", "aget_response_from_messages"):
    setattr(DetoxSynthesizer, _name, made_here(inspect.getattr_static(DetoxSynthesizer, _name)))


def _one(text: str) -> Generator[str, None, None]:
    yield text


async def _aone(text: str) -> AsyncGenerator[str, None]:
    yield text


def _only_asks(inner: BaseSynthesizer) -> bool:
    """LlamaIndex's own, without a program of someone else's: what it answers comes from its LLM."""
    program, default = (getattr(inner, name, None) for name in ("_program_factory", "_default_program_factory"))
    return type(inner).__module__.startswith(_LLAMA_INDEX) and program == default
