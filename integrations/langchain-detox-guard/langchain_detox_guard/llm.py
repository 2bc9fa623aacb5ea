"""`DetoxiGenLLM`: a plain-text LangChain LLM. Knows prompts and LangChain's callbacks; leaves decoding to the core."""

from __future__ import annotations

from contextlib import aclosing, closing
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from detox_guard import InvalidParamsError
from langchain_core.language_models.base import LanguageModelInput  # noqa: TC002
from langchain_core.language_models.llms import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from langchain_core.runnables import Runnable, RunnableConfig

from langchain_detox_guard._errors import langchain_errors
from langchain_detox_guard._fields import ModelFields
from langchain_detox_guard._identity import generation_info
from langchain_detox_guard._threads import batch, stream, wide

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Sequence

    from detox_guard import Chunk, DecodingParams, DetoxiGen
    from detox_guard import Generation as Reply
    from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
    from langchain_core.language_models.base import LangSmithParams


class DetoxiGenLLM(ModelFields, BaseLLM):
    """A local language model, steered away from toxicity while it decodes, where another LangChain LLM stood.

    `DetoxiGenLLM()` is the embedded default backbone with its detoxifier. Every field may also be given per call.
    `generate(...).generations[i][0].generation_info` has `finish_reason`, `model_name`, `token_usage` and `detox` (the
    steering summary). Raises the errors of `detox_guard`, which are LangChain's own too (`ContextOverflowError`, …).
    """

    model_config = ModelFields.model_config  # of two bases, pydantic would take LangChain's, which ignores misspellings

    @property
    def _llm_type(self) -> str:
        return "detox-guard"

    # -- what users call, where LangChain's own would not do

    def generate(self, prompts: list[str], stop: list[str] | None = None, *args: Any, **kwargs: Any) -> LLMResult:
        """LangChain's, with this call's keywords folded into the model: its cache key ignores keywords."""
        with langchain_errors():
            llm, rest = self._for_generate(stop, kwargs)
            if llm._caches():
                llm._loaded = llm._detoxigen()
        return super(DetoxiGenLLM, llm).generate(prompts, llm.stop, *args, **rest)

    async def agenerate(
        self, prompts: list[str], stop: list[str] | None = None, *args: Any, **kwargs: Any
    ) -> LLMResult:
        """`generate` without blocking the event loop; cancelling the task frees its seats."""
        with langchain_errors():
            llm, rest = self._for_generate(stop, kwargs)
            if llm._caches():
                llm._loaded = await llm._adetoxigen()
        return await super(DetoxiGenLLM, llm).agenerate(prompts, llm.stop, *args, **rest)

    def _for_generate(self, stop: list[str] | None, kwargs: dict[str, Any]) -> tuple[DetoxiGenLLM, dict[str, Any]]:
        return self._with(kwargs if stop is None else {**kwargs, "stop": stop})

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """All replies, decoded together. With `return_exceptions`, one bad prompt gives its error and no other does.

        Ctrl-C ends it and frees its seats."""
        if not return_exceptions:
            return super().batch(inputs, config, **kwargs)
        # One `_generate` for all would give one prompt's error to all; apart, they still share the engine's batch.
        replies = self.batch_as_completed(inputs, config, return_exceptions=True, **kwargs)
        return [reply for _, reply in sorted(replies, key=itemgetter(0))]

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """`batch` without blocking the event loop."""
        if not return_exceptions:
            return await super().abatch(inputs, config, **kwargs)
        return await Runnable.abatch(self, inputs, wide(config, len(inputs)), return_exceptions=True, **kwargs)

    # -- what LangChain calls

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        with langchain_errors():
            llm, params = self._resolve(stop, kwargs)
            detoxigen = llm._detoxigen()
            if llm.streaming and len(prompts) == 1:
                replies = [_whole(list(llm._tokens(detoxigen, prompts[0], params, run_manager)))]
            else:
                replies = batch(detoxigen, prompts, params)
        return _result(detoxigen, replies)

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        with langchain_errors():
            llm, params = self._resolve(stop, kwargs)
            detoxigen = await llm._adetoxigen()
            if llm.streaming and len(prompts) == 1:
                tokens = llm._atokens(detoxigen, prompts[0], params, run_manager)
                replies = [_whole([piece async for piece in tokens])]
            else:
                replies = await detoxigen.abatch(prompts, params)
        return _result(detoxigen, replies)

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        with langchain_errors():
            llm, params = self._resolve(stop, kwargs)
            with closing(llm._tokens(llm._detoxigen(), prompt, params, run_manager)) as tokens:
                for _, out in tokens:
                    yield out

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        with langchain_errors():
            llm, params = self._resolve(stop, kwargs)
            detoxigen = await llm._adetoxigen()
            async with aclosing(llm._atokens(detoxigen, prompt, params, run_manager)) as tokens:
                async for _, out in tokens:
                    yield out

    def _resolve(self, stop: list[str] | None, kwargs: dict[str, Any]) -> tuple[DetoxiGenLLM, DecodingParams]:
        llm, rest = self._with(kwargs)
        for name, value in rest.items():
            raise InvalidParamsError(name, value, "not a parameter of DetoxiGenLLM")
        return llm, llm._decoding_params(stop)

    def _tokens(
        self, detoxigen: DetoxiGen, prompt: str, params: DecodingParams, run_manager: CallbackManagerForLLMRun | None
    ) -> Generator[tuple[Chunk, GenerationChunk], None, None]:
        with closing(stream(detoxigen, prompt, params)) as chunks:
            for chunk in chunks:
                out = _as_chunk(detoxigen, chunk)
                if run_manager:
                    run_manager.on_llm_new_token(out.text, chunk=out)
                yield chunk, out

    async def _atokens(
        self,
        detoxigen: DetoxiGen,
        prompt: str,
        params: DecodingParams,
        run_manager: AsyncCallbackManagerForLLMRun | None,
    ) -> AsyncGenerator[tuple[Chunk, GenerationChunk], None]:
        async with aclosing(detoxigen.astream(prompt, params)) as chunks:
            async for chunk in chunks:
                out = _as_chunk(detoxigen, chunk)
                if run_manager:
                    await run_manager.on_llm_new_token(out.text, chunk=out)
                yield chunk, out

    # -- identity and counting

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self._ls(super()._get_ls_params(stop, **kwargs), stop, kwargs)

    def get_token_ids(self, text: str) -> list[int]:
        """The backbone's own tokens (loads it)."""
        return self._detoxigen().encode(text)


def _as_chunk(detoxigen: DetoxiGen, chunk: Chunk) -> GenerationChunk:
    return GenerationChunk(text=chunk.text, generation_info=chunk.generation and _info(detoxigen, chunk.generation))


def _info(detoxigen: DetoxiGen, reply: Reply) -> dict[str, Any]:
    return {**generation_info(detoxigen, reply), "token_usage": _usage([reply])}


def _result(detoxigen: DetoxiGen, replies: Sequence[Reply]) -> LLMResult:
    generations = [[Generation(text=reply.text, generation_info=_info(detoxigen, reply))] for reply in replies]
    return LLMResult(
        generations=generations, llm_output={"token_usage": _usage(replies), "model_name": detoxigen.model_id}
    )


def _usage(replies: Sequence[Reply]) -> dict[str, int]:
    read = sum(reply.usage.prompt_tokens for reply in replies)
    written = sum(reply.usage.completion_tokens for reply in replies)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _whole(pieces: list[tuple[Chunk, GenerationChunk]]) -> Reply:
    reply = pieces[-1][0].generation
    assert reply is not None, "a stream ends with its generation, or raises"
    return reply
