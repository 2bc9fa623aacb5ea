"""`ChatDetoxiGen`: a LangChain chat model. Knows messages, tools and schemas; leaves templates, grammars and decoding
to the core."""

from __future__ import annotations

from collections.abc import Callable, Sequence  # noqa: TC003
from contextlib import aclosing, closing
from operator import itemgetter
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from detox_guard import ChatPrompt, InvalidParamsError, PromptError, tool_choice_of
from langchain_core.language_models.base import LanguageModelInput  # noqa: TC002
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage  # noqa: TC002
from langchain_core.outputs import ChatGenerationChunk, ChatResult, LLMResult  # noqa: TC002
from langchain_core.runnables import Runnable, RunnableConfig, RunnableSerializable  # noqa: TC002
from langchain_core.runnables.utils import AnyConfigurableField  # noqa: TC002
from langchain_core.tools import BaseTool  # noqa: TC002
from pydantic import field_validator

from langchain_detox_guard._around_chat import Choosable, ConfigurableChat
from langchain_detox_guard._errors import langchain_errors
from langchain_detox_guard._fields import ModelFields
from langchain_detox_guard._profile import Profile
from langchain_detox_guard._structured import structured
from langchain_detox_guard._threads import generate, stream, wide
from langchain_detox_guard._turns import Turn, result_of
from langchain_detox_guard.tools import Asked, shown_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from detox_guard import DecodingParams
    from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
    from langchain_core.language_models.base import LangSmithParams
    from langchain_core.language_models.model_profile import ModelProfile

_KEYWORDS = {"tools", "tool_choice", "parallel_tool_calls", "response_format", "unfinished"}
_WITHOUT_EFFECT = {"stream", "strict"}
"""LangChain's own: `stream` picks the method before it comes here; `strict` is how every grammar is."""


class ChatDetoxiGen(Choosable, ModelFields, BaseChatModel):
    """A local chat model, steered away from toxicity while it decodes, where another LangChain chat model stood.

    `ChatDetoxiGen()` is the embedded default backbone with its detoxifier. Every field may also be given per call or
    bound. Forced tool calls and structured output are held to their grammar while decoding, so even a small model's
    arguments fit their schema; one that was cut off or broken off is none, and raises `IncompleteAnswerError`.
    `response_metadata["detox"]` has the steering summary of each reply. Raises the errors of `detox_guard`, which are
    LangChain's own too (`ContextOverflowError`, …).
    """

    model_config = ModelFields.model_config  # of two bases, pydantic would take LangChain's, which ignores misspellings

    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template, such as `{"enable_thinking": False}`."""
    _own_settable: ClassVar = frozenset({"chat_template_kwargs"})

    @field_validator("profile", mode="before")
    @classmethod
    def _own_profile(cls, value: object) -> object:
        """One that we made is made again: of the model as it is now."""
        return None if isinstance(value, Profile) else value

    @property
    def _llm_type(self) -> str:
        return "chat-detox-guard"

    # -- tools and structured output

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: dict[str, Any] | str | bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Show `tools` to the model. `tool_choice`: None or "auto", "none", "any" ("required", True), a name, a dict.

        "any" and a name force a call: the reply is decoded inside the grammar of the tools' schemas. A forced call that
        was cut off raises `IncompleteAnswerError`; with `unfinished="keep"` it comes as one of `invalid_tool_calls`.
        With `parallel_tool_calls=False` the first call of a reply is its only one.
        """
        shown = shown_of(tools)
        if (parallel := kwargs.get("parallel_tool_calls")) not in (None, True, False):
            raise InvalidParamsError("parallel_tool_calls", parallel, "True, False or None")
        tool_choice_of(tool_choice, shown)  # a bad one is an error here, not at the first call
        return self.bind(tools=shown, tool_choice=tool_choice, **kwargs)  # type: ignore[no-any-return]

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Literal["json_schema", "function_calling", "json_mode"] = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Replies that fit `schema`: a pydantic class gives its instances, anything else a dict.

        "json_schema" tells the model the schema and decodes inside it; "function_calling" does so as one forced tool
        call; "json_mode" tells the model nothing (your prompt does) and needs no schema, but holds to one it is given.
        An answer that was cut off ("length") or broken off ("guard") raises `IncompleteAnswerError`, when streamed at
        its end; with `include_raw` that is the `parsing_error`.
        """
        return structured(self, schema, method, include_raw, strict, **kwargs)

    def configurable_fields(
        self, **kwargs: AnyConfigurableField
    ) -> RunnableSerializable[LanguageModelInput, AIMessage]:
        """LangChain's; tools and schemas on top of it stay configurable."""
        made: Any = super().configurable_fields(**kwargs)
        return ConfigurableChat(default=made.default, fields=made.fields)

    # -- what users call, where LangChain's own would not do

    def generate(
        self, messages: list[list[BaseMessage]], stop: list[str] | None = None, *args: Any, **kwargs: Any
    ) -> LLMResult:
        """LangChain's, with this call's keywords folded into the model, for the cache key and the cache's default."""
        with langchain_errors():
            llm, rest = self._with(kwargs)
            if llm._caches():
                llm._loaded = llm._detoxigen()
        return super(ChatDetoxiGen, llm).generate(messages, stop, *args, **rest)

    async def agenerate(
        self, messages: list[list[BaseMessage]], stop: list[str] | None = None, *args: Any, **kwargs: Any
    ) -> LLMResult:
        """`generate` without blocking the event loop; cancelling the task frees its seat."""
        with langchain_errors():
            llm, rest = self._with(kwargs)
            if llm._caches():
                llm._loaded = await llm._adetoxigen()
        return await super(ChatDetoxiGen, llm).agenerate(messages, stop, *args, **rest)

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """All replies. Their threads only wait: the engine decodes them together. Ctrl-C frees their seats."""
        replies = self.batch_as_completed(inputs, config, return_exceptions=return_exceptions, **kwargs)
        return [reply for _, reply in sorted(replies, key=itemgetter(0))]

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """`batch` without blocking the event loop, and never more at once than the engine's queue takes."""
        return await super().abatch(inputs, wide(config, len(inputs)), return_exceptions=return_exceptions, **kwargs)

    # -- what LangChain calls

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with langchain_errors():
            llm, asked, prompt, params = self._resolve(messages, stop, kwargs)
            detoxigen = llm._detoxigen()
            return result_of(detoxigen, generate(detoxigen, prompt, params), asked, llm._guard)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with langchain_errors():
            llm, asked, prompt, params = self._resolve(messages, stop, kwargs)
            detoxigen = await llm._adetoxigen()
            return result_of(detoxigen, await detoxigen.agenerate(prompt, params), asked, llm._guard)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        with langchain_errors():
            llm, asked, prompt, params = self._resolve(messages, stop, kwargs)
            detoxigen = llm._detoxigen()
            turn = Turn(detoxigen, asked, llm._guard)
            with closing(stream(detoxigen, prompt, params)) as chunks:
                for chunk in chunks:
                    yield from turn.push(chunk)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        with langchain_errors():
            llm, asked, prompt, params = self._resolve(messages, stop, kwargs)
            detoxigen = await llm._adetoxigen()
            turn = Turn(detoxigen, asked, llm._guard)
            async with aclosing(detoxigen.astream(prompt, params)) as chunks:
                async for chunk in chunks:
                    for out in turn.push(chunk):
                        yield out

    def _resolve(
        self, messages: Sequence[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]
    ) -> tuple[ChatDetoxiGen, Asked, ChatPrompt, DecodingParams]:
        llm, rest = self._with(kwargs)
        for name in rest.keys() - _KEYWORDS - _WITHOUT_EFFECT:
            raise InvalidParamsError(name, rest[name], "not a parameter of ChatDetoxiGen")
        asked = Asked.of(**{name: rest[name] for name in _KEYWORDS & rest.keys()})
        grammar = {} if asked.grammar is None else {"grammar": asked.grammar}
        return llm, asked, llm._prompt(asked, messages), llm._decoding_params(stop, **grammar)

    def _prompt(self, asked: Asked, messages: Sequence[BaseMessage]) -> ChatPrompt:
        return ChatPrompt(asked.messages(messages), asked.tools, chat_template_kwargs=self.chat_template_kwargs or {})

    # -- identity and counting

    @property
    def _identifying_params(self) -> dict[str, Any]:
        params: dict[str, Any] = ModelFields._identifying_params.fget(self)  # type: ignore[attr-defined]
        return {**params, "chat_template_kwargs": self.chat_template_kwargs}

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """The cache key: what was loaded and all that decides the text, which the serialized form does not say."""
        stop = self.stop if stop is None else stop
        return str(sorted({**self._identifying_params, **kwargs, "stop": stop}.items()))

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self._ls(super()._get_ls_params(stop, **kwargs), stop, kwargs)

    def _resolve_model_profile(self) -> ModelProfile:
        """With the context window as `max_input_tokens`, which is looked up (and so loaded) when it is asked for."""
        return cast("ModelProfile", Profile(self.model_copy()))

    def get_token_ids(self, text: str) -> list[int]:
        """The backbone's own tokens (loads it)."""
        return self._detoxigen().encode(text)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Prompt tokens as the model would read them, template and tools included (loads it).

        Of messages that the template does not take, as `trim_messages` counts parts of a chat: their texts' alone.
        """
        if not messages:
            return 0
        with langchain_errors():
            asked = Asked.of(tools)
            prompt = self._prompt(asked, messages)
            try:
                return self._detoxigen().count_tokens(prompt)
            except PromptError:
                return sum(len(self.get_token_ids(message["content"])) for message in prompt.messages)
