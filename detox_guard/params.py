"""What a caller may ask of a request and of an engine. Knows bounds; knows no model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from detox_guard.checked import Checked
from detox_guard.grammar import Grammar
from detox_guard.policy import GuardPolicy, Rule

__all__ = ["MAX_NEW_TOKENS", "DecodingParams", "EngineConfig"]

MAX_NEW_TOKENS = 131_072
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]


class DecodingParams(Checked):
    """How one request is decoded. Raises `InvalidParamsError` for a bad value, with its field and bound."""

    alpha: Annotated[float, Field(ge=0, le=100)] = 3.0
    """Strength of the contrast (paper: α). 0 is the plain model, served without a detoxifier row."""
    calm_share: Annotated[float, Field(gt=0, le=1)] = 1 / 6
    """Share of alpha used behind a prompt in which the embedded scorer finds nothing toxic. 1 is all of it, always."""
    rule: Rule = "bounded"
    """How the views are mixed (`detox_guard.contrast`). "detoxigen" is the paper's, in probability space. "dexperts" is
    the log-space rule of Liu et al. 2021. "bounded" (ours) is that, weaker where a token would move by more than .4
    alpha nats."""
    plausibility: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """β of Li et al. 2023: only tokens with at least this share of the best token's probability. 0 is off."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Divides the logits of every view. 0 is greedy; one under 1e-6 counts as 1e-6."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Nucleus of the generator: the smallest set of tokens with this much probability. It comes before `top_k`."""
    top_k: Annotated[int, Field(ge=0, le=2**31)] = 0
    """Only the so many most probable tokens of the nucleus. 0 is off."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] = 1.0
    """Keskar et al. 2019, on prompt and reply, for every view alike. 1 is off."""
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] = 256
    """Longest reply, in tokens."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Repeats a reply. None draws a fresh one."""
    stop: Annotated[tuple[StopString, ...], Field(max_length=64)] = ()
    """Text that ends the reply and is never part of it."""
    stop_token_ids: Annotated[tuple[TokenId, ...], Field(max_length=256)] = ()
    """Ids of tokens that end the reply, besides the model's own end tokens."""
    ignore_eos: bool = False
    """Go on past the model's own end tokens."""
    grammar: Grammar | None = None
    """A language the reply is held to. It ends the reply itself, so `stop`, `stop_token_ids` and `ignore_eos` do not go
    with it."""
    trace: bool = True
    """Keep the figures of every step."""
    guard: GuardPolicy | None = None
    """Check text before it is released, and decode again what fails. None is steering alone."""

    @field_validator("alpha", "calm_share", "plausibility", "temperature", "top_p", "repetition_penalty", mode="before")
    @classmethod
    def _no_bool(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError("Input should be a number, not a bool")
        return value

    @field_validator("stop", "stop_token_ids", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        """One string or id, or any list of them, becomes a tuple."""
        if value is None:
            return ()
        if isinstance(value, str | int) and not isinstance(value, bool):
            return (value,)
        return tuple(value) if isinstance(value, list) else value

    @field_validator("grammar")
    @classmethod
    def _ends_itself(cls, value: Grammar | None, info: ValidationInfo) -> Grammar | None:
        if value is not None:
            for name in ("stop", "stop_token_ids", "ignore_eos"):
                if info.data.get(name):
                    raise ValueError(f"{name} cannot go with a grammar, which says itself where the reply ends")
        return value


class EngineConfig(Checked):
    """Bounds of one engine."""

    max_rows: Annotated[int, Field(ge=2, le=4096)] = 64
    """Rows in the running batch. A plain request takes one; a steered one takes one more for each detoxifier."""
    max_queue: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    """Requests that are prepared and wait for a seat."""
    when_full: Literal["wait", "refuse"] = "wait"
    """Who finds the queue full waits for a place, in the order of arrival; or gets `EngineBusyError` at once, as a
    server may want."""
    max_slots: Annotated[int, Field(ge=16)] | None = None
    """K/V slots a row may hold. None is the backbone's own limit."""
    max_cached_slots: Annotated[int, Field(ge=256)] = 131_072
    """Rows times the longest row, which is what the shared cache takes. A request that would exceed it waits for others
    to leave, so one long prompt cannot fill the memory."""
    prefill_chunk: Annotated[int, Field(ge=16)] = 512
    """The most prompt tokens computed between two decoding steps. Where others wait, a chunk takes about a fifth of a
    second at most, so that a long prompt holds up neither running streams nor short prompts."""
    prompt_cache_slots: Annotated[int, Field(ge=0)] = 4096
    """K/V slots kept of prompts that were computed lately, so that the same prompt again costs nothing. 0 is none."""
    pack_weights: bool = True
    """On a CPU in float32, hold linear layers in oneDNN's blocked layout, which makes the second row nearly free. The
    backbone's `nn.Linear` modules are replaced."""
