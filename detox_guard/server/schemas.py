"""The requests of OpenAI's interface, as far as they have a meaning here, and our `detox` beside them.

Knows names, types and bounds; asks nothing. What has no meaning here is refused by name, unless it changes nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from detox_guard._strict import field_of
from detox_guard.settings import DecodingParams, GuardPolicy, Rule

__all__ = ["ChatRequest", "CompletionRequest", "DetoxOptions", "GuardOptions", "ModerationRequest", "SamplingRequest"]

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class GuardOptions(_Strict):
    """The guard of one request. Whether it may be looser than the server's, the server decides."""

    threshold: float | None = field_of(GuardPolicy, "threshold", default=None)
    unit: Literal["sentence"] | int | None = field_of(GuardPolicy, "unit", default=None)
    max_unit_tokens: int | None = field_of(GuardPolicy, "max_unit_tokens", default=None)
    context_chars: int | None = field_of(GuardPolicy, "context_chars", default=None)
    max_rewinds: int | None = field_of(GuardPolicy, "max_rewinds", default=None)
    ladder: list[float] | None = field_of(GuardPolicy, "ladder", default=None, json_schema_extra=None)
    on_exhausted: Literal["replace", "stop", "raise"] | None = field_of(GuardPolicy, "on_exhausted", default=None)
    scan_input: bool | None = field_of(GuardPolicy, "scan_input", default=None)
    keep_discarded: bool | None = None
    """Tell the text that was taken back, in the answer's `detox.interventions`."""


class DetoxOptions(_Strict):
    """How one reply is steered and guarded. What is left out is as the server has it."""

    alpha: float | None = field_of(DecodingParams, "alpha", default=None)
    calm_share: float | None = field_of(DecodingParams, "calm_share", default=None)
    rule: Rule | None = field_of(DecodingParams, "rule", default=None)
    plausibility: float | None = field_of(DecodingParams, "plausibility", default=None)
    guard: bool | GuardOptions | None = None
    """False is none, true the server's, an object changes it."""
    trace: bool = False
    """Give the figures of every token with the answer."""


class StreamOptions(_Strict):
    """What a stream tells besides."""

    include_usage: bool = False
    """A last chunk with the usage of the whole request."""
    include_obfuscation: bool | None = None
    """Of no effect: nothing is padded here."""


class SamplingRequest(_Strict):
    """What chats and completions have in common."""

    model: str | None = None
    """A name of `/v1/models`; the first one if left out."""
    stream: bool | None = False
    """Server-sent events."""
    stream_options: StreamOptions | None = None
    """Only for a stream."""
    n: Annotated[int, Field(ge=1)] | None = 1
    """Replies to each prompt. With a seed, reply `i` has `seed + i`."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Longest reply, in tokens."""
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Nucleus of the plain model."""
    top_k: Annotated[int, Field(ge=0)] | None = None
    """Only the so many most probable tokens; 0 is off."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    """1 is off."""
    seed: Seed | None = None
    """Repeats a reply."""
    stop: str | Annotated[list[str], Field(max_length=64)] | None = None
    """Text that ends the reply and is never part of it."""
    frequency_penalty: float | None = None
    """Must be 0: `repetition_penalty` is what this server has."""
    presence_penalty: float | None = None
    """Must be 0: `repetition_penalty` is what this server has."""
    logit_bias: dict[str, float] | None = None
    """Must be empty."""
    detox: DetoxOptions = DetoxOptions()
    """Steering and guard."""
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @field_validator("frequency_penalty", "presence_penalty")
    @classmethod
    def _zero(cls, value: float | None) -> float | None:
        if value:
            raise ValueError("has no meaning here but 0; repetition_penalty is what this server has")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _empty(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value:
            raise ValueError("has no meaning here: token ids differ by model")
        return value

    @field_validator("detox", mode="before")
    @classmethod
    def _null_is_none(cls, value: object) -> object:
        return {} if value is None else value


class ChatRequest(SamplingRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    """OpenAI's messages: text, parts of text, tool calls and their results."""
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """`max_tokens` by its newer name, and before it."""
    tools: list[dict[str, Any]] | None = None
    """Functions that the model may call."""
    tool_choice: str | dict[str, Any] | None = None
    """auto, none, required, or a function by its name. The last two are held to its schema while it is decoded."""
    parallel_tool_calls: bool | None = None
    """False: the first call of a reply is its only one."""
    response_format: dict[str, Any] | None = None
    """text, json_object or json_schema; the last two are held to while decoding."""
    logprobs: bool | None = False
    """Log probabilities of the tokens as they were drawn: of the steered distribution."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """So many of the most probable tokens besides, by the same distribution. Only with `logprobs`."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template, such as `{"enable_thinking": false}`."""


class CompletionRequest(SamplingRequest):
    """`POST /v1/completions`."""

    prompt: str | Annotated[list[str], Field(min_length=1)]
    """One text or several."""
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    """Log probabilities of the tokens as they were drawn, and of so many of the most probable ones besides."""
    echo: Literal[False] | None = False
    """Must be false."""
    best_of: Literal[1] | None = None
    """Must be 1."""
    suffix: None = None
    """Must be left out."""


class ModerationPart(_Strict):
    """One text of several."""

    type: Literal["text"]
    text: str


class ModerationRequest(_Strict):
    """`POST /v1/moderations`."""

    input: str | Annotated[list[str], Field(min_length=1)] | Annotated[list[ModerationPart], Field(min_length=1)]
    """One text or several."""
    model: str | None = None
    """A scorer's name; the guard's own if left out."""
    threshold: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Score from which a text is flagged; the guard's own if left out."""

    @property
    def texts(self) -> list[str]:
        """All of them."""
        given = [self.input] if isinstance(self.input, str) else self.input
        return [one if isinstance(one, str) else one.text for one in given]
