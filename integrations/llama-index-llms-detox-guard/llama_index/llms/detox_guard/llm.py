"""`DetoxiGenLLM`: a LlamaIndex LLM on a `DetoxiGen`. Knows LlamaIndex's contract; leaves decoding to the core.

All eight ways of asking share `_run` and its async twin `_arun`. None calls another: LlamaIndex decorates each, and a
call through two of them would be reported, and its tokens counted, twice.
"""

from __future__ import annotations

import asyncio
import inspect
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

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
)
from llama_index.core.bridge.pydantic import Field, field_serializer
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.custom import CustomLLM
from llama_index.core.types import PydanticProgramMode
from llama_index.llms.detox_guard.callers import asked_by_a_program, refusals
from llama_index.llms.detox_guard.messages import is_react, to_core_messages
from llama_index.llms.detox_guard.options import (
    current_scope,
    made_here,
    read_options,
)
from llama_index.llms.detox_guard.portable import Portable, as_json, refuse_stand_ins
from llama_index.llms.detox_guard.reply import GrowingReply
from llama_index.llms.detox_guard.structured import DetoxStructuredLLM, StructuredAnswers
from llama_index.llms.detox_guard.tool_calls import ToolCalls

import detox_guard
from detox_guard import DecodingParams, InvalidParamsError, LoadOptions, PromptError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence


__all__ = ["DetoxiGenLLM"]

_NO_LIMIT = 131_072  # for backbones without a limit of positions: the core's bound of one reply
Shown = TypeVar("Shown", CompletionResponse, ChatResponse)
_NO_STOPS: dict[str, Any] = {"stop": (), "stop_token_ids": (), "ignore_eos": False}
_REACT_STOP = ("Observation:",)
_STRUCTURED = ("json_schema", "tool_calls")
_IN_FORCE = "detox_options"
_LOADING = ("model", "detoxifier", "device", "dtype", "revision", "loading")
_AUTO = (
    'Hub id or folder; None is "auto": the shipped one for the default model, else one trained here for yours, else '
    "texts that need no training."
)


class DetoxiGenLLM(StructuredAnswers, ToolCalls, Portable, CustomLLM):
    """A local model that is steered away from toxicity while it decodes, as a LlamaIndex LLM.

    `DetoxiGenLLM()` is the embedded default; `DetoxiGenLLM("org/model", detoxifier="folder", device="cuda", alpha=4.0,
    max_new_tokens=200)` takes every field of `DecodingParams` as a keyword, here and in every call, and those of
    `LoadOptions` (`device_map="auto"`, `quantization_config="int8"`, `engine="llamacpp"`, …) here. Constructing it
    loads nothing: the model comes with the first call that needs it, and is shared by every LLM that names the same
    model. Raises `InvalidParamsError` for an unknown or bad keyword, here and per call.

    Copies keep all of that. A `detoxigen`, a scorer object or a hook of one's own is shared by copies. It belongs to
    its process: pickling it, or making an LLM of what `to_dict` says about it, raises `NotPicklableError`.

    A structured answer or a forced tool call that does not end with "stop" raises `IncompleteAnswerError`, in streams
    at their end. Where LlamaIndex would swallow an `InvalidParamsError` it is a `RefusedCallError`.
    """

    own: ClassVar[tuple[str, ...]] = ("detoxigen",)

    model: str | None = Field(default=None, description="Hub id, folder or GGUF file; None is the embedded default.")
    detoxifier: str | None = Field(default=None, description=_AUTO)
    device: str | None = Field(default=None, description="Where the model runs; None chooses.")
    dtype: str | None = Field(default=None, description="Number type of the weights; None chooses.")
    revision: str | None = Field(default=None, description="Revision of the model on the hub.")
    loading: dict[str, Any] | None = Field(
        default=None, repr=False, description="Other fields of LoadOptions that were set."
    )
    decoding: dict[str, Any] = Field(default_factory=dict, description="Fields of DecodingParams that were set.")
    function_calling: bool | None = Field(
        default=None,
        description="Offer tools to the model; None asks its chat template. True works without one, by a plain prompt.",
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None,
        description='Variables of the chat template, such as {"enable_thinking": False}; a call\'s own win.',
    )
    detoxigen: Any = Field(default=None, exclude=True, repr=False, description="A loaded DetoxiGen, instead of a name.")
    pydantic_program_mode: PydanticProgramMode = Field(
        default=PydanticProgramMode.LLM, description="Structured answers are decoded under the schema's grammar."
    )

    def __init__(self, model: str | None = None, **options: Any) -> None:
        given = options.pop("decoding", None) or {}
        if not isinstance(given, dict):
            raise InvalidParamsError("decoding", given, "a dict of fields of DecodingParams")
        if not isinstance(options.get("engine"), str | None) and "detoxigen" not in options:
            options["detoxigen"] = options.pop("engine")  # its old name
        options["loading"] = self._load_options(options, options.pop("loading", None))
        decoding = self._moved(options, given)
        options |= {"model": None if model is None else str(model), "decoding": decoding}
        super().__init__(**options)
        self._check_model()

    @classmethod
    def _load_options(cls, options: dict[str, Any], loading: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """`loading` with the fields of `LoadOptions` that `options` have, which are taken out of them.

        Quantization configs of transformers are kept as mappings.
        """
        if not (loading is None or isinstance(loading, dict)):
            raise InvalidParamsError("loading", loading, "a dict of fields of LoadOptions")
        others = [name for name in options if name in LoadOptions.model_fields and name not in cls.model_fields]
        loading = {**(loading or {}), **{name: options.pop(name) for name in others}}
        refuse_stand_ins(cls.__name__, loading)
        rounded: Any = loading.get("quantization_config")
        if hasattr(rounded, "to_dict"):
            loading["quantization_config"] = {k: getattr(v, "value", v) for k, v in rounded.to_dict().items()}
        return loading or None

    @classmethod
    def _moved(cls, options: dict[str, Any], decoding: Mapping[str, Any]) -> dict[str, Any]:
        """`decoding` with what `options` have of it, which is taken out of them. Raises `InvalidParamsError`."""
        decoding = dict(decoding)
        for name in [name for name in options if name not in cls.model_fields]:
            if name not in DecodingParams.model_fields:
                raise InvalidParamsError(name, options[name], f"no field of {cls.__name__} or DecodingParams")
            decoding[name] = options.pop(name)
        refuse_stand_ins(cls.__name__, decoding)
        decoding = read_options(decoding)
        DecodingParams(**decoding)
        return decoding

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some fields changed, those of `DecodingParams` too. Raises `InvalidParamsError`."""
        changes = dict(update or {})
        loading = self._load_options(changes, changes.pop("loading", self.loading))
        decoding = self._moved(changes, changes.pop("decoding", None) or self.decoding)
        copy = super().model_copy(update={**changes, "loading": loading, "decoding": decoding}, deep=deep)
        copy._check_model()
        return copy

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "detoxigen" or name in _LOADING:
            self.model_copy(update={name: value})
        super().__setattr__(name, value)

    def _check_model(self) -> None:
        """Raises `InvalidParamsError` for a `detoxigen` that is none or has names beside it, and for bad loading."""
        if self.detoxigen is None:
            LoadOptions(**self._how)
            return
        if isinstance(self.detoxigen, str | bytes | int | float | list | tuple | dict):
            raise InvalidParamsError("detoxigen", self.detoxigen, "a DetoxiGen or None")
        if named := [name for name in _LOADING if getattr(self, name) is not None]:
            raise InvalidParamsError(
                "detoxigen", "your own", f"not together with {', '.join(named)}, which it has its own of"
            )

    def in_force(self) -> dict[str, Any]:
        """The options of `detox_options`, so that events tell them and no ingestion cache answers without them."""
        options = current_scope().options
        return {_IN_FORCE: as_json(dict(options))} if options else {}

    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: Any) -> Self:
        """The LLM that `to_dict` told of. Options that were only in force then are not part of it."""
        return super().from_dict({name: value for name, value in data.items() if name != _IN_FORCE}, **kwargs)

    @field_serializer("loading")
    def _loading_as_json(self, loading: dict[str, Any] | None) -> Any:
        """Without a token: what is read back asks for HF_TOKEN again."""
        return loading and as_json({name: value for name, value in loading.items() if name != "token"})

    @field_serializer("decoding")
    def _decoding_as_json(self, decoding: dict[str, Any]) -> dict[str, Any]:
        return {name: as_json(value) for name, value in decoding.items()}

    @classmethod
    def class_name(cls) -> str:
        return "DetoxiGenLLM"

    # -- what it is

    def load(self) -> detox_guard.DetoxiGen:
        """The model behind this LLM; loads it if nobody in the process has. Raises `BackboneError` and the like."""
        return self.detoxigen or detox_guard.DetoxiGen.shared(self.model, detoxifier=self.detoxifier, **self._how)

    @property
    def _how(self) -> dict[str, Any]:
        """What is said about loading, as `LoadOptions` takes it."""
        return {"device": self.device, "dtype": self.dtype, "revision": self.revision, **(self.loading or {})}

    @property
    def metadata(self) -> LLMMetadata:
        """Capabilities of the model, which this loads."""
        model = self.load()
        window = model.context_window or _NO_LIMIT
        tools = model.supports_tools if self.function_calling is None else self.function_calling
        return LLMMetadata(
            context_window=window,
            num_output=min(self.params.max_new_tokens, window // 2),
            is_chat_model=model.has_chat_template,
            is_function_calling_model=model.has_chat_template and tools,
            model_name=model.model_id,
        )

    @property
    def params(self) -> DecodingParams:
        """What a call decodes with: the model's defaults, then this LLM's fields, then `detox_options`."""
        return self.load().params.replace(**{**self.decoding, **current_scope().options})

    def to_payload(self) -> dict[str, Any]:
        """What events say about this LLM, as JSON. Loads nothing: they fire before the first call, on the loop."""
        return self.to_dict()

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain text. Hand it to whatever counts tokens: `PromptHelper(tokenizer=llm.encode)`."""
        return self.load().encode(text)

    # -- the eight ways of asking

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Continue a plain text. `kwargs` are fields of `DecodingParams`."""
        *_, response = self._run(GrowingReply.as_completion, self._plain(prompt, formatted), kwargs)
        return response

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """`complete`, as it is decoded. Closing the generator frees the seat."""
        return self._run(GrowingReply.as_completion, self._plain(prompt, formatted), kwargs)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Reply to a conversation. `kwargs` are fields of `DecodingParams`, `tools` and `tool_choice`."""
        *_, response = self._run(GrowingReply.as_chat, messages, kwargs)
        return response

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """`chat`, as it is decoded. Closing the generator frees the seat."""
        return self._run(GrowingReply.as_chat, messages, kwargs)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """`complete` without blocking the event loop; cancelling the task frees the seat."""
        responses = await self._arun(GrowingReply.as_completion, self._plain(prompt, formatted), kwargs)
        return [response async for response in responses][-1]

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """`stream_complete` without blocking the event loop; closing the generator frees the seat."""
        return await self._arun(GrowingReply.as_completion, self._plain(prompt, formatted), kwargs)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """`chat` without blocking the event loop; cancelling the task frees the seat."""
        return [response async for response in await self._arun(GrowingReply.as_chat, messages, kwargs)][-1]

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """`stream_chat` without blocking the event loop; closing the generator frees the seat."""
        return await self._arun(GrowingReply.as_chat, messages, kwargs)

    # -- the one way they all take

    def _run(
        self, show: Callable[[GrowingReply], Shown], prompt: str | Sequence[ChatMessage], kwargs: dict[str, Any]
    ) -> Generator[Shown, None, None]:
        failures = current_scope().failures
        with refusals(failures):
            model = self.load()
            reply, *request = self._request(model, prompt, kwargs)
            # Outside the generator, so that a bad prompt raises in the call and not in the first `next`.
            chunks = model.stream(*request)

        def responses() -> Generator[Shown, None, None]:
            with refusals(failures), closing(chunks) as running:
                for chunk in running:
                    if reply.push(chunk):
                        yield show(reply)

        return responses()

    async def _arun(
        self, show: Callable[[GrowingReply], Shown], prompt: str | Sequence[ChatMessage], kwargs: dict[str, Any]
    ) -> AsyncGenerator[Shown, None]:
        failures = current_scope().failures
        with refusals(failures):
            model = await asyncio.to_thread(self.load)
            reply, *request = self._request(model, prompt, kwargs)

        async def responses() -> AsyncGenerator[Shown, None]:
            with refusals(failures):
                async with aclosing(model.astream(*request)) as chunks:
                    async for chunk in chunks:
                        if reply.push(chunk):
                            yield show(reply)

        return responses()

    def _plain(self, prompt: str, formatted: bool) -> str:
        if formatted or self.completion_to_prompt is None:
            return prompt
        return self.completion_to_prompt(prompt)

    def _request(
        self, model: detox_guard.DetoxiGen, prompt: str | Sequence[ChatMessage], kwargs: dict[str, Any]
    ) -> tuple[GrowingReply, Any, DecodingParams]:
        """Where the reply gathers, the core's prompt, and how to decode it."""
        scope = current_scope()
        options = {**self.decoding, **scope.options, **kwargs}
        tools = options.pop("tools", None) or []
        if not isinstance(tools, list | tuple):
            raise InvalidParamsError("tools", tools, "a list of tools")
        choice = detox_guard.tool_choice_of(options.pop("tool_choice", None), tools)
        parallel = options.pop("allow_parallel_tool_calls", True)
        if not isinstance(parallel, bool):
            raise InvalidParamsError("allow_parallel_tool_calls", parallel, "True or False")
        variables = self._variables(options.pop("chat_template_kwargs", None))
        options = read_options(options)
        tools = [] if choice.mode == "none" else tools
        if choice.mode == "any":
            options["grammar"] = detox_guard.Grammar.tool_calls(tools, name=choice.name)
        if options.get("grammar") is not None:  # it ends the reply itself; what ends other replies is set aside
            options = {**options, **{name: value for name, value in _NO_STOPS.items() if name not in kwargs}}
        elif not isinstance(prompt, str) and is_react(prompt) and not options.get("stop", model.params.stop):
            options["stop"] = _REACT_STOP
        params = model.params.replace(**options)
        structured = params.grammar is not None and params.grammar.kind in _STRUCTURED
        whole = structured or asked_by_a_program()
        reply = GrowingReply(model.model_id, scope.collectors, tools=tools, parallel=parallel, whole=whole)
        if isinstance(prompt, str):
            if kwargs.get("chat_template_kwargs"):
                raise InvalidParamsError(
                    "chat_template_kwargs", variables, "messages: a plain text goes through no template"
                )
            return reply, prompt, params
        if model.has_chat_template:
            laid_out: dict[str, Any] = {"chat_template_kwargs": variables} if variables else {}
            return reply, detox_guard.ChatPrompt(to_core_messages(prompt), tuple(tools), **laid_out), params
        if tools:
            raise PromptError("tools", f"{len(tools)} tools", f"{model.model_id} has no chat template")
        if variables:
            raise PromptError("chat_template_kwargs", variables, f"{model.model_id} has no chat template")
        to_prompt = self.messages_to_prompt or messages_to_prompt
        return reply, to_prompt(prompt), params

    def _variables(self, given: Any) -> dict[str, Any]:
        """Variables of the chat template: this LLM's, then the call's."""
        if given is not None and not (isinstance(given, dict) and all(isinstance(name, str) for name in given)):
            raise InvalidParamsError("chat_template_kwargs", given, "a dict of variables by name")
        return {**(self.chat_template_kwargs or {}), **(given or {})}


# What is made in a block of options is decoded under them, wherever it is awaited.
for _cls, _names in {
    DetoxiGenLLM: (
        *("achat", "acomplete", "astream_chat", "astream_complete"),
        *("astructured_predict", "astream_structured_predict", "apredict", "astream", "apredict_and_call"),
        *("achat_with_tools", "astream_chat_with_tools"),
    ),
    DetoxStructuredLLM: ("achat", "acomplete", "astream_chat"),
}.items():
    for _name in _names:
        setattr(_cls, _name, made_here(inspect.getattr_static(_cls, _name)))
