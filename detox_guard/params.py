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
    """How one request is decoded.

    `alpha` is the strength of the contrast (paper: α); 0 is the plain model, served without a detoxifier row.
    `rule` is the formula that mixes the streams (`detox_guard.contrast`): "detoxigen" is the paper's, in probability
    space; "dexperts" is the log-space anti-expert rule of Liu et al. 2021; "bounded" (ours) is the same, its strength
    lowered where a token would move by more than .4 alpha nats. `calm_share` is the share of alpha that is used behind
    a prompt in which the embedded scorer sees nothing toxic (`detox_guard.strength`); 1 = alpha behind every prompt.
    `plausibility` is β of Li et al. 2023: only tokens with `p_gen ≥ β·max p_gen` may be sampled; 0 turns it off.
    Sampling: `temperature` 0 is greedy, and one under 1e-6 counts as 1e-6; the nucleus is `top_p`, then `top_k` (0 =
    off). `repetition_penalty` is Keskar et al. 2019, on prompt and reply, applied to the logits of every stream alike.
    `seed` None draws a fresh one. `stop` strings end the reply and are never part of it; so are `stop_token_ids`,
    besides the model's own end tokens (unless `ignore_eos`). `grammar` holds the reply to a language; it ends the reply
    itself, so `stop`, `stop_token_ids` and `ignore_eos` do not go with it. `trace` keeps the figures of every step.
    `guard` checks text before it is released and decodes what fails again; None is steering alone.
    Raises `InvalidParamsError`.
    """

    alpha: Annotated[float, Field(ge=0, le=100)] = 3.0
    calm_share: Annotated[float, Field(gt=0, le=1)] = 1 / 6
    rule: Rule = "bounded"
    plausibility: Annotated[float, Field(ge=0, lt=1)] = 0.0
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    top_k: Annotated[int, Field(ge=0, le=2**31)] = 0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] = 1.0
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] = 256
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Annotated[tuple[StopString, ...], Field(max_length=64)] = ()
    stop_token_ids: Annotated[tuple[TokenId, ...], Field(max_length=256)] = ()
    ignore_eos: bool = False
    grammar: Grammar | None = None
    trace: bool = True
    guard: GuardPolicy | None = None

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
    """Bounds of one engine.

    `max_rows`: rows in the running batch (a guarded request takes 1 + streams, an unguarded one 1).
    `max_queue`: requests that are prepared and wait for a seat. `when_full`: who finds the queue full waits for a
    place in it, in the order of arrival ("wait"); or gets `EngineBusyError` at once ("refuse"), as a server may want.
    `max_slots`: K/V slots a row may hold, None = the backbone's own limit. `max_cached_slots`: rows times the longest
    row, which is what the shared cache takes; a request that would exceed it waits for others to leave, so that one
    long prompt cannot fill the memory. `prefill_chunk`: the most prompt tokens computed between two decoding steps;
    where others wait for it, a chunk takes about a fifth of a second at most, so that a long prompt holds up neither
    running streams nor short prompts. `prompt_cache_slots`: K/V slots kept of prompts that were computed lately, so
    that the same prompt again costs nothing; 0 = none. `pack_weights`: on a CPU in fp32, hold the linear layers'
    weights in oneDNN's blocked layout (the second row is then nearly free); the backbone's `nn.Linear` modules are
    replaced.
    """

    max_rows: Annotated[int, Field(ge=2, le=4096)] = 64
    max_queue: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    when_full: Literal["wait", "refuse"] = "wait"
    max_slots: Annotated[int, Field(ge=16)] | None = None
    max_cached_slots: Annotated[int, Field(ge=256)] = 131_072
    prefill_chunk: Annotated[int, Field(ge=16)] = 512
    prompt_cache_slots: Annotated[int, Field(ge=0)] = 4096
    pack_weights: bool = True
