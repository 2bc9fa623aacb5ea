"""`ChatDetoxiGen`: a LangChain chat model. Knows messages, tools and schemas; leaves templates, grammars and decoding
to the core."""

from __future__ import annotations

from collections.abc import Callable, Sequence  # noqa: TC003
from contextlib import aclosing, closing
from operator import itemgetter
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from detox_guard import ChatPrompt, IncompleteAnswerError, InvalidParamsError, PromptError
from langchain_core.language_models.base import LanguageModelInput  # noqa: TC002
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import (
    ConfigurableField,
    Runnable,
    RunnableConfig,
    RunnableLambda,
    RunnableSerializable,
)
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.configurable import RunnableConfigurableAlternatives, RunnableConfigurableFields
from langchain_core.runnables.utils import AnyConfigurableField  # noqa: TC002
from langchain_core.tools import BaseTool  # noqa: TC002
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import field_validator

from langchain_detox_guard._engine import Around, Bound, EngineFields, generation_info
from langchain_detox_guard._errors import langchain_errors
from langchain_detox_guard._profile import Profile
from langchain_detox_guard._threads import generate, stream, wide
from langchain_detox_guard.tools import (
    UNFINISHED,
    Asked,
    CallStream,
    as_ai_message,
    choice_of,
    schema_of,
    shown_of,
    tool_of,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from detox_guard import Chunk, DecodingParams, DetoxiGen, Generation, GuardPolicy
    from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
    from langchain_core.language_models.base import LangSmithParams
    from langchain_core.language_models.model_profile import ModelProfile

_KEYWORDS = {"tools", "tool_choice", "parallel_tool_calls", "response_format", "unfinished"}
_WITHOUT_EFFECT = {"stream", "strict"}
"""LangChain's own: `stream` picks the method before it comes here; `strict` is how every grammar is."""


class _Choosable:
    """A chat model, or what is around one, to which alternatives may be given."""

    @classmethod
    def _bound(cls) -> type[Bound]:
        return BoundChat

    def configurable_alternatives(
        self, which: ConfigurableField, **kwargs: Any
    ) -> RunnableSerializable[LanguageModelInput, AIMessage]:
        """LangChain's; tools and schemas on top of it are bound to each alternative."""
        made: Any = cast("Any", super()).configurable_alternatives(which, **kwargs)
        return AlternativeChats(**dict(made))


class ChatDetoxiGen(_Choosable, EngineFields, BaseChatModel):
    """A local chat model, steered away from toxicity while it decodes, where another LangChain chat model stood.

    `ChatDetoxiGen()` is the embedded default backbone with its detoxifier. Every field may also be given per call or
    bound. Forced tool calls and structured output are held to their grammar while decoding, so even a small model's
    arguments fit their schema; one that was cut off or broken off is none, and raises `IncompleteAnswerError`.
    `response_metadata["detox"]` has the steering summary of each reply. Raises the errors of `detox_guard`, which are
    LangChain's own too (`ContextOverflowError`, …).
    """

    model_config = (
        EngineFields.model_config
    )  # of two bases, pydantic would take LangChain's, which ignores misspellings

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
        return self.bind(tools=shown, tool_choice=choice_of(tool_choice, shown), **kwargs)  # type: ignore[no-any-return]

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
        return _structured(self, schema, method, include_raw, strict, **kwargs)

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
                llm._loaded = llm._engine()
        return super(ChatDetoxiGen, llm).generate(messages, stop, *args, **rest)

    async def agenerate(
        self, messages: list[list[BaseMessage]], stop: list[str] | None = None, *args: Any, **kwargs: Any
    ) -> LLMResult:
        """`generate` without blocking the event loop; cancelling the task frees its seat."""
        with langchain_errors():
            llm, rest = self._with(kwargs)
            if llm._caches():
                llm._loaded = await llm._aengine()
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
            engine = llm._engine()
            return _result(engine, generate(engine, prompt, params), asked, llm._guard)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with langchain_errors():
            llm, asked, prompt, params = self._resolve(messages, stop, kwargs)
            engine = await llm._aengine()
            return _result(engine, await engine.agenerate(prompt, params), asked, llm._guard)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        with langchain_errors():
            llm, asked, prompt, params = self._resolve(messages, stop, kwargs)
            engine = llm._engine()
            turn = _Turn(engine, asked, llm._guard)
            with closing(stream(engine, prompt, params)) as chunks:
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
            engine = await llm._aengine()
            turn = _Turn(engine, asked, llm._guard)
            async with aclosing(engine.astream(prompt, params)) as chunks:
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
        params: dict[str, Any] = EngineFields._identifying_params.fget(self)  # type: ignore[attr-defined]
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
        return self._engine().encode(text)

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
                return self._engine().count_tokens(prompt)
            except PromptError:
                return sum(len(self.get_token_ids(message["content"])) for message in prompt.messages)


def _structured(
    model: Runnable[LanguageModelInput, AIMessage],
    schema: Any,
    method: str = "json_schema",
    include_raw: bool = False,
    strict: bool | None = None,
    **kwargs: Any,
) -> Runnable[LanguageModelInput, Any]:
    """`with_structured_output` of a chat model, or of one with keywords and a config around it."""
    if schema is None and method != "json_mode":
        raise InvalidParamsError("schema", schema, f"needed by method {method!r}")
    is_class = isinstance(schema, type) and is_basemodel_subclass(schema)
    parser: Any
    if method == "function_calling":
        shown = tool_of(schema, "schema")
        name = shown["function"]["name"]
        bound: dict[str, Any] = {"tools": [shown], "tool_choice": name}
        parser = (
            PydanticToolsParser(tools=[schema], first_tool_only=True)
            if is_class
            else JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)
        )
    elif method in ("json_schema", "json_mode"):
        own = None if schema is None else schema_of(schema)
        # A pydantic class looks at the answer again, so what no grammar can hold to is left to it.
        asked = {"schema": own, "strict": not is_class}
        named = {"type": "json_schema", "json_schema": asked}
        bound = {"response_format": named if method == "json_schema" else {"type": "json_object", **asked}}
        parser = PydanticOutputParser(pydantic_object=schema) if is_class else JsonOutputParser()
    else:
        raise InvalidParamsError("method", method, "json_schema, function_calling or json_mode")
    traced = {"kwargs": {"method": method, "strict": strict}, "schema": schema}
    if include_raw:
        bound["unfinished"] = "keep"
    llm = model.bind(**bound, **kwargs, **({} if schema is None else {"ls_structured_output_format": traced}))
    if not include_raw:
        return llm | parser  # type: ignore[no-any-return]
    parse = RunnableLambda(_finished) | parser

    def told(raw: AIMessage, config: RunnableConfig) -> dict[str, Any]:
        try:
            return {"raw": raw, "parsed": parse.invoke(raw, config), "parsing_error": None}
        except Exception as error:
            return {"raw": raw, "parsed": None, "parsing_error": error}

    async def atold(raw: AIMessage, config: RunnableConfig) -> dict[str, Any]:
        try:
            return {"raw": raw, "parsed": await parse.ainvoke(raw, config), "parsing_error": None}
        except Exception as error:
            return {"raw": raw, "parsed": None, "parsing_error": error}

    # The model comes first: only the first step of a sequence is told what is bound to it, and what a call sets.
    return llm | RunnableLambda(told, atold, name="parse")


def _finished(message: AIMessage) -> AIMessage:
    """Raise `IncompleteAnswerError` for a structured answer that is not whole."""
    reason = message.response_metadata.get("finish_reason")
    if reason in UNFINISHED:
        raise IncompleteAnswerError(reason)
    return message


class BoundChat(_Choosable, Bound):  # type: ignore[no-redef]
    """A chat model, or what is around one, with keywords and a config: tools and schemas on top keep both."""

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[LanguageModelInput, AIMessage]:
        """As `ChatDetoxiGen.bind_tools`."""
        if isinstance(self.bound, ChatDetoxiGen):
            return self.bind(**cast("Any", self.bound.bind_tools(tools, **kwargs)).kwargs)
        return self.model_copy(update={"bound": _inside(self.bound, "bind_tools", tools, **kwargs)})

    def with_structured_output(
        self, schema: dict[str, Any] | type | None = None, **kwargs: Any
    ) -> Runnable[LanguageModelInput, Any]:
        """As `ChatDetoxiGen.with_structured_output`."""
        if isinstance(self.bound, ChatDetoxiGen):
            return _structured(self, schema, **kwargs)
        return self.model_copy(update={"bound": _inside(self.bound, "with_structured_output", schema, **kwargs)})


def _inside(wrapper: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    """The same wrapper around what the method makes of the model in it. (LangChain's own would lose the wrapper.)"""
    if isinstance(wrapper, RunnableBindingBase) and not isinstance(wrapper, BoundChat):
        return wrapper.model_copy(update={"bound": _inside(wrapper.bound, method, *args, **kwargs)})
    return getattr(wrapper, method)(*args, **kwargs)


class ConfigurableChat(_Choosable, Around, RunnableConfigurableFields):  # type: ignore[type-arg]
    """A chat model with fields that a config sets. Serialized, it is LangChain's."""

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[LanguageModelInput, AIMessage]:
        """As `ChatDetoxiGen.bind_tools`."""
        return self.bind(**cast("Any", self.default).bind_tools(tools, **kwargs).kwargs)  # type: ignore[no-any-return]

    def with_structured_output(
        self, schema: dict[str, Any] | type | None = None, **kwargs: Any
    ) -> Runnable[LanguageModelInput, Any]:
        """As `ChatDetoxiGen.with_structured_output`."""
        return _structured(self, schema, **kwargs)

    @classmethod
    def lc_id(cls) -> list[str]:
        return RunnableConfigurableFields.lc_id()


class AlternativeChats(_Choosable, Around, RunnableConfigurableAlternatives):  # type: ignore[type-arg]
    """Chat models of which a config chooses. Serialized, it is LangChain's."""

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[LanguageModelInput, Any]:
        """Each binds them in its own way."""
        return self._each("bind_tools", tools, **kwargs)

    def with_structured_output(self, schema: Any = None, **kwargs: Any) -> Runnable[LanguageModelInput, Any]:
        """Each does so in its own way."""
        return self._each("with_structured_output", schema, **kwargs)

    def _each(self, method: str, *args: Any, **kwargs: Any) -> AlternativeChats:
        def on(model: Any) -> Any:
            return _inside(model, method, *args, **kwargs)

        others = {
            name: on(one) if isinstance(one, Runnable) else lambda make=one: on(make())
            for name, one in self.alternatives.items()
        }
        return self.model_copy(update={"default": on(self.default), "alternatives": others})

    @classmethod
    def lc_id(cls) -> list[str]:
        return RunnableConfigurableAlternatives.lc_id()


class _Turn:
    """One streamed reply, as LangChain's chunks."""

    def __init__(self, engine: DetoxiGen, asked: Asked, guard: GuardPolicy | None) -> None:
        self._engine = engine
        self._asked = asked
        self._guard = guard
        self._calls = CallStream(asked.tools, parallel=asked.parallel) if asked.tools else None

    def push(self, chunk: Chunk) -> Iterator[ChatGenerationChunk]:
        """Nothing while a tool call is under way; on the last chunk, usage and metadata."""
        content, calls = self._calls.push(chunk.text) if self._calls else (chunk.text, [])
        if chunk.generation is None:
            if content or calls:
                yield ChatGenerationChunk(message=AIMessageChunk(content=content, tool_call_chunks=calls))
            return
        self._asked.check(chunk.generation.finish_reason)
        if self._calls:
            rest, broken = self._calls.finish(chunk.generation.text)
            content, calls = content + rest, [*calls, *broken]
        yield ChatGenerationChunk(
            message=AIMessageChunk(
                content=content,
                tool_call_chunks=calls,
                usage_metadata=_usage(chunk.generation),
                response_metadata=generation_info(self._engine, chunk.generation, self._guard),
                chunk_position="last",
            ),
            generation_info={"finish_reason": chunk.generation.finish_reason},
        )


def _result(engine: DetoxiGen, reply: Generation, asked: Asked, guard: GuardPolicy | None) -> ChatResult:
    asked.check(reply.finish_reason)
    fields = {"usage_metadata": _usage(reply), "response_metadata": generation_info(engine, reply, guard)}
    message = AIMessage(reply.text, **fields)
    if asked.tools:
        message = as_ai_message(reply.text, asked.tools, parallel=asked.parallel, **fields)
    # No llm_output: LangChain would copy it into `response_metadata`, but only where nothing was streamed.
    return ChatResult(
        generations=[ChatGeneration(message=message, generation_info={"finish_reason": reply.finish_reason})]
    )


def _usage(reply: Generation) -> UsageMetadata:
    usage = reply.usage
    return UsageMetadata(
        input_tokens=usage.prompt_tokens, output_tokens=usage.completion_tokens, total_tokens=usage.total_tokens
    )
