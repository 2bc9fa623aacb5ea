"""`DetoxiGenLLM`: a LlamaIndex LLM on a `DetoxiGen`. Knows LlamaIndex's contract; leaves decoding to the core.

All eight ways of asking share `_run` and its async twin `_arun`. None calls another: LlamaIndex decorates each, and a
call through two of them would be reported, and its tokens counted, twice.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any, TypeVar

from llama_index.core.base.llms.generic_utils import messages_to_prompt
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    ToolCallBlock,
)
from llama_index.core.bridge.pydantic import Field
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.custom import CustomLLM
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.types import Model, PydanticProgramMode
from llama_index.llms.detox_guard.messages import choice_of, is_react, to_core_messages
from llama_index.llms.detox_guard.options import current_scope
from llama_index.llms.detox_guard.reply import Reply

import detox_guard
from detox_guard import DecodingParams, InvalidParamsError, PromptError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator, Sequence

    from llama_index.core.bridge.pydantic import BaseModel
    from llama_index.core.prompts import PromptTemplate
    from llama_index.core.tools.types import BaseTool

__all__ = ["DetoxiGenLLM"]

_NO_LIMIT = 131_072  # for backbones without a limit of positions: the core's bound of one reply
Shown = TypeVar("Shown", CompletionResponse, ChatResponse)
_NO_STOPS: dict[str, Any] = {"stop": (), "stop_token_ids": (), "ignore_eos": False}
_REACT_STOP = ("Observation:",)


class DetoxiGenLLM(CustomLLM, FunctionCallingLLM):
    """A local model that is steered away from toxicity while it decodes, as a LlamaIndex LLM.

    `DetoxiGenLLM()` is the embedded default; `DetoxiGenLLM("org/model", detoxifier="folder", device="cuda", alpha=4.0,
    max_new_tokens=200)` takes every field of `DecodingParams` as a keyword, here and in every call. Constructing it
    loads nothing: the engine comes with the first call that needs it, and is shared by every LLM that names the same
    model. Raises `InvalidParamsError` for an unknown or bad keyword.
    """

    model: str | None = Field(default=None, description="Hub id, folder or GGUF file; None is the embedded default.")
    detoxifier: str | None = Field(default=None, description="Hub id or folder; None is the embedded one.")
    device: str | None = Field(default=None, description="Where the model runs; None chooses.")
    dtype: str | None = Field(default=None, description="Number type of the weights; None chooses.")
    revision: str | None = Field(default=None, description="Revision of the model on the hub.")
    decoding: dict[str, Any] = Field(default_factory=dict, description="Fields of DecodingParams that were set.")
    function_calling: bool | None = Field(
        default=None,
        description="Offer tools to the model; None asks its chat template. True works without one, by a plain prompt.",
    )
    engine: Any = Field(default=None, exclude=True, repr=False, description="A loaded DetoxiGen, instead of a name.")
    pydantic_program_mode: PydanticProgramMode = Field(
        default=PydanticProgramMode.LLM, description="Structured answers are decoded under the schema's grammar."
    )

    def __init__(self, model: str | None = None, **options: Any) -> None:
        decoding = dict(options.pop("decoding", {}))
        for name in [name for name in options if name not in type(self).model_fields]:
            if name not in DecodingParams.model_fields:
                raise InvalidParamsError(name, options[name], "no field of DetoxiGenLLM or DecodingParams")
            decoding[name] = options.pop(name)
        if isinstance(decoding.get("guard"), dict):
            decoding["guard"] = detox_guard.GuardPolicy(**decoding["guard"])
        DecodingParams(**decoding)
        super().__init__(model=None if model is None else str(model), decoding=decoding, **options)

    @classmethod
    def class_name(cls) -> str:
        return "DetoxiGenLLM"

    # -- what it is

    def load(self) -> detox_guard.DetoxiGen:
        """The engine behind this LLM; loads it if nobody in the process has. Raises `BackboneError` and the like."""
        return self.engine or detox_guard.DetoxiGen.shared(
            self.model, detoxifier=self.detoxifier, device=self.device, dtype=self.dtype, revision=self.revision
        )

    @property
    def metadata(self) -> LLMMetadata:
        """Capabilities of the model, which this loads."""
        engine = self.load()
        window = engine.context_window or _NO_LIMIT
        tools = engine.supports_tools if self.function_calling is None else self.function_calling
        return LLMMetadata(
            context_window=window,
            num_output=min(self.params.max_new_tokens, window // 2),
            is_chat_model=engine.has_chat_template,
            is_function_calling_model=engine.has_chat_template and tools,
            model_name=engine.model_id,
        )

    @property
    def params(self) -> DecodingParams:
        """What a call decodes with: the engine's defaults, then this LLM's fields, then `detox_options`."""
        return self.load().params.replace(**{**self.decoding, **current_scope().options})

    def to_payload(self) -> dict[str, Any]:
        """What events say about this LLM. Loads nothing: events fire before the first call, on the event loop."""
        return self.to_dict()

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain text. Hand it to whatever counts tokens: `PromptHelper(tokenizer=llm.encode)`."""
        return self.load().encode(text)

    # -- the eight ways of asking

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Continue a plain text. `kwargs` are fields of `DecodingParams`."""
        *_, response = self._run(Reply.as_completion, self._plain(prompt, formatted), kwargs)
        return response

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """`complete`, as it is decoded. Closing the generator frees the seat."""
        return self._run(Reply.as_completion, self._plain(prompt, formatted), kwargs)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Reply to a conversation. `kwargs` are fields of `DecodingParams`, `tools` and `tool_choice`."""
        *_, response = self._run(Reply.as_chat, messages, kwargs)
        return response

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """`chat`, as it is decoded. Closing the generator frees the seat."""
        return self._run(Reply.as_chat, messages, kwargs)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """`complete` without blocking the event loop; cancelling the task frees the seat."""
        responses = await self._arun(Reply.as_completion, self._plain(prompt, formatted), kwargs)
        return [response async for response in responses][-1]

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """`stream_complete` without blocking the event loop; closing the generator frees the seat."""
        return await self._arun(Reply.as_completion, self._plain(prompt, formatted), kwargs)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """`chat` without blocking the event loop; cancelling the task frees the seat."""
        return [response async for response in await self._arun(Reply.as_chat, messages, kwargs)][-1]

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """`stream_chat` without blocking the event loop; closing the generator frees the seat."""
        return await self._arun(Reply.as_chat, messages, kwargs)

    # -- tools

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: str | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        messages = list(chat_history or [])
        if user_msg is not None:
            messages.append(ChatMessage(user_msg) if isinstance(user_msg, str) else user_msg)
        return {
            **kwargs,
            "messages": messages,
            "tools": [tool.metadata.to_openai_tool(skip_length_check=True) for tool in tools],
            "tool_choice": tool_choice or ("any" if tool_required else "auto"),
            "allow_parallel_tool_calls": allow_parallel_tool_calls,
        }

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The tool calls of a reply. Raises ValueError if there are none and `error_on_no_tool_call`.

        Calls that cannot be read, such as one cut off at `max_new_tokens`, stand in `raw["invalid_tool_calls"]`.
        """
        calls = [
            ToolSelection.model_validate(
                {"tool_id": block.tool_call_id or "", "tool_name": block.tool_name, "tool_kwargs": block.tool_kwargs}
            )
            for block in response.message.blocks
            if isinstance(block, ToolCallBlock)
        ]
        if not calls and error_on_no_tool_call:
            wrote = "".join([response.message.content or "", *((response.raw or {}).get("invalid_tool_calls", ()))])
            raise ValueError(f"the model called no tool; it wrote {wrote[:80]!r}")
        return calls

    # -- structured answers: upstream's text program, decoded under the schema's grammar, so that it always parses

    def structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """An instance of `output_cls`."""
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
        """An instance of `output_cls`."""
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
        """Ever fuller instances; the last one is whole."""
        return super().stream_structured_predict(output_cls, prompt, self._bound(output_cls, llm_kwargs), **prompt_args)

    async def astream_structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Any, None]:
        """Ever fuller instances; the last one is whole."""
        return await super().astream_structured_predict(
            output_cls, prompt, self._bound(output_cls, llm_kwargs), **prompt_args
        )

    def _bound(self, output_cls: type[BaseModel], llm_kwargs: dict[str, Any] | None) -> dict[str, Any]:
        if self.pydantic_program_mode != PydanticProgramMode.LLM:
            return llm_kwargs or {}
        return {"grammar": detox_guard.Grammar.json_schema(output_cls.model_json_schema()), **(llm_kwargs or {})}

    # -- the one way they all take

    def _run(
        self, show: Callable[[Reply], Shown], prompt: str | Sequence[ChatMessage], kwargs: dict[str, Any]
    ) -> Generator[Shown, None, None]:
        engine = self.load()
        reply, *request = self._request(engine, prompt, kwargs)

        # Outside the generator, so that a bad prompt raises in the call and not in the first `next`.
        chunks = engine.stream(*request)

        def responses() -> Generator[Shown, None, None]:
            with closing(chunks) as running:
                for chunk in running:
                    if reply.push(chunk):
                        yield show(reply)

        return responses()

    async def _arun(
        self, show: Callable[[Reply], Shown], prompt: str | Sequence[ChatMessage], kwargs: dict[str, Any]
    ) -> AsyncGenerator[Shown, None]:
        engine = await asyncio.to_thread(self.load)
        reply, *request = self._request(engine, prompt, kwargs)

        async def responses() -> AsyncGenerator[Shown, None]:
            async with aclosing(engine.astream(*request)) as chunks:
                async for chunk in chunks:
                    if reply.push(chunk):
                        yield show(reply)

        return responses()

    def _plain(self, prompt: str, formatted: bool) -> str:
        if formatted or self.completion_to_prompt is None:
            return prompt
        return self.completion_to_prompt(prompt)

    def _request(
        self, engine: detox_guard.DetoxiGen, prompt: str | Sequence[ChatMessage], kwargs: dict[str, Any]
    ) -> tuple[Reply, Any, DecodingParams]:
        """Where the reply gathers, the core's prompt, and how to decode it."""
        scope = current_scope()
        options = {**self.decoding, **scope.options, **kwargs}
        tools = options.pop("tools", None) or []
        choice = choice_of(options.pop("tool_choice", None) or "auto", tools)
        parallel = options.pop("allow_parallel_tool_calls", True)
        tools = [] if choice == "none" else tools
        if tools and choice != "auto":
            name = None if choice in ("any", "required") else choice
            options["grammar"] = detox_guard.Grammar.tool_calls(tools, name=name)
        if options.get("grammar") is not None:  # it ends the reply itself; what ends other replies is set aside
            options = {**options, **{name: value for name, value in _NO_STOPS.items() if name not in kwargs}}
        elif not isinstance(prompt, str) and is_react(prompt) and not options.get("stop", engine.params.stop):
            options["stop"] = _REACT_STOP
        params = engine.params.replace(**options)
        reply = Reply(engine.model_id, scope.collectors, tools=bool(tools), parallel=parallel)
        if isinstance(prompt, str):
            return reply, prompt, params
        if engine.has_chat_template:
            return reply, detox_guard.ChatPrompt(to_core_messages(prompt), tuple(tools)), params
        if tools:
            raise PromptError("tools", f"{len(tools)} tools", f"{engine.model_id} has no chat template")
        to_prompt = self.messages_to_prompt or messages_to_prompt
        return reply, to_prompt(prompt), params
