"""Structured answers: upstream's text program, decoded under the schema's grammar, so that it always parses.

Knows schemas and upstream's ways of asking for an instance; knows no model and no prompt.
"""

from __future__ import annotations

from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any

from llama_index.core.llms.llm import LLM
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.types import Model, PydanticProgramMode
from llama_index.llms.detox_guard.callers import refusals
from llama_index.llms.detox_guard.options import aheld, current_scope, held
from llama_index.llms.detox_guard.portable import Portable

import detox_guard

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Sequence

    from llama_index.core.base.llms.types import ChatMessage, ChatResponseAsyncGen, ChatResponseGen
    from llama_index.core.bridge.pydantic import BaseModel
    from llama_index.core.prompts import PromptTemplate

__all__ = ["DetoxStructuredLLM", "StructuredAnswers"]


class StructuredAnswers(LLM):
    """The ways of asking an LLM for an instance of a class."""

    def structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """An instance of `output_cls`. Raises `IncompleteAnswerError`."""
        options = self._bound(output_cls, llm_kwargs)
        answer: Model = super().structured_predict(output_cls, prompt, options, **prompt_args)
        return answer

    async def astructured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """An instance of `output_cls`. Raises `IncompleteAnswerError`."""
        options = self._bound(output_cls, llm_kwargs)
        answer: Model = await super().astructured_predict(output_cls, prompt, options, **prompt_args)
        return answer

    def stream_structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[Any, None, None]:
        """Ever fuller instances. The last one is whole; else `IncompleteAnswerError`, or what validation raises."""
        options = self._bound(output_cls, llm_kwargs)
        answers = super().stream_structured_predict(output_cls, prompt, options, **prompt_args)

        def checked() -> Generator[Any, None, None]:
            last = None
            with closing(answers):
                for last in answers:
                    yield last
            _check_last(output_cls, last)

        return held(current_scope(), checked())

    async def astream_structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Any, None]:
        """Ever fuller instances. The last one is whole; else `IncompleteAnswerError`, or what validation raises."""
        options = self._bound(output_cls, llm_kwargs)
        answers = await super().astream_structured_predict(output_cls, prompt, options, **prompt_args)

        async def checked() -> AsyncGenerator[Any, None]:
            last = None
            async with aclosing(answers):
                async for last in answers:
                    yield last
            _check_last(output_cls, last)

        return aheld(current_scope(), checked())

    def as_structured_llm(self, output_cls: type[BaseModel], **kwargs: Any) -> StructuredLLM:
        """An LLM that answers with instances of `output_cls`."""
        return DetoxStructuredLLM(llm=self, output_cls=output_cls, **kwargs)

    def _bound(self, output_cls: type[BaseModel], llm_kwargs: dict[str, Any] | None) -> dict[str, Any]:
        if self.pydantic_program_mode != PydanticProgramMode.LLM:
            return llm_kwargs or {}
        with refusals():
            grammar = detox_guard.Grammar.json_schema(output_cls.model_json_schema(), lenient=True)
        return {"grammar": grammar, **(llm_kwargs or {})}


class DetoxStructuredLLM(Portable, StructuredLLM):
    """Upstream's, whose streams belong to the options under which they were made, and which never loses its LLM."""

    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        return held(current_scope(), super().stream_chat(messages, **kwargs))

    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        return aheld(current_scope(), await super().astream_chat(messages, **kwargs))


def _check_last(output_cls: type[BaseModel], last: Any) -> None:
    """Raises what is wrong with the last instance of a stream that ended by itself."""
    if last is None:
        raise detox_guard.IncompleteAnswerError("stop", "")
    if not isinstance(last, output_cls):
        output_cls.model_validate(last.model_dump(exclude_unset=True))
