"""What a caller may ask of a request, of a guard and of an engine. Knows bounds; knows no model, no thread."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, ValidationInfo, field_serializer, field_validator
from pydantic_core import PydanticSerializationError

from detox_guard._strict import StrictModel
from detox_guard.errors import NotPicklableError
from detox_guard.text.grammar import Grammar

__all__ = ["MAX_NEW_TOKENS", "DecodingParams", "EngineConfig", "GuardPolicy", "Rule", "Rung"]

MAX_NEW_TOKENS = 131_072
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
Rule = Literal["bounded", "dexperts", "detoxigen"]
Alpha = Annotated[float, Field(ge=0, le=100)]


class Rung(StrictModel):
    """One step of the ladder: how a unit is decoded again. None keeps what the request asked for."""

    alpha: Alpha
    rule: Rule | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None


class GuardPolicy(StrictModel):
    """What is checked before it is released, and what happens to what fails.

    Text is released unit by unit. A unit is scored as its reader will see it: by itself, and together with the text
    before it; strings of JSON and of tool calls decoded, each by itself; content joined without the calls in it; a unit
    of more than twelve words clause by clause too (a clause counts where it is half-way from `threshold` to 1). The
    highest score counts. Raises `InvalidParamsError`.
    """

    scorer: Any = "embedded"
    """"embedded", "minilm", a Hugging Face classifier (`load_scorer`), or any `ToxicityScorer`. One that fails, or is
    too slow, fails the request."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Up to and including this score a unit is released."""
    unit: Literal["sentence"] | Annotated[int, Field(ge=1, le=1024)] = "sentence"
    """What is released at once: a sentence, or so many tokens (cut at the next word)."""
    max_unit_tokens: Annotated[int, Field(ge=1, le=1024)] = 48
    """A sentence of more tokens is released in pieces."""
    context_chars: Annotated[int, Field(ge=0, le=100_000)] = 200
    """So many characters of the reply before a unit are scored together with it."""
    ladder: Annotated[tuple[Rung, ...], Field(max_length=32)] = (Rung(alpha=6.0), Rung(alpha=9.0))
    """How a flagged unit is decoded again: first on the first rung, and so on; the last one repeats. A number is an
    alpha. An alpha below the request's own does not lower it. The token at which the score first rose above the
    threshold is not chosen again."""
    max_rewinds: Annotated[int, Field(ge=0, le=100)] = 4
    """How often one unit is decoded again."""
    on_exhausted: Literal["replace", "stop", "raise"] = "replace"
    """What then happens: "replace" the unit and end the reply, "stop" before it, or "raise" `GuardError`. The finish
    reason of the first two is "guard"."""
    replacement: Annotated[str, Field(max_length=10_000)] = "[removed]"
    """What stands in the place of a unit that is replaced."""
    scan_input: bool = False
    """Score the prompt too, each message as a whole and sentence by sentence. A flagged one is answered by
    `on_exhausted` alone."""
    scorer_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 10.0
    """Seconds after which a scorer that has not answered fails the request (`ScorerError`)."""
    on_event: Callable[..., object] | None = None
    """Called with every `Intervention`, on the decoding thread: be quick. An exception in it is logged, no more."""
    audit_log: str | None = None
    """A file that gets every `Intervention` as a JSON line, rotated at 10 MB. A line that it does not take (full disk)
    goes to the logger "detox_guard.guard"."""
    keep_discarded: bool = False
    """Put text that was taken back into events and log."""

    @field_validator("scorer", mode="before")
    @classmethod
    def _scores(cls, value: object) -> object:
        if not ((isinstance(value, str) and value) or callable(getattr(value, "score", None))):
            raise ValueError("Input should be a name, or an object with .name and .score()")
        return value

    @field_validator("unit", mode="before")
    @classmethod
    def _sentence_or_tokens(cls, value: object) -> object:
        if value != "sentence" and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1024):
            raise ValueError('Input should be "sentence", or a number of tokens from 1 to 1024')
        return value

    @field_validator("ladder", mode="before")
    @classmethod
    def _rungs(cls, value: object) -> object:
        """Numbers are alphas; a list will do."""
        if not isinstance(value, list | tuple):
            return value
        return tuple(
            Rung(alpha=float(rung)) if isinstance(rung, int | float) and not isinstance(rung, bool) else rung
            for rung in value
        )

    @field_validator("threshold", "scorer_timeout_s", mode="before")
    @classmethod
    def _no_bool(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError("Input should be a number, not a bool")
        return value

    @field_serializer("scorer", "on_event", mode="wrap", when_used="json")
    def _by_name(self, value: Any, handler: SerializerFunctionWrapHandler) -> Any:
        """In JSON, as in a trace, an object stands there by its name; no policy is made of that again."""
        try:
            return handler(value)
        except PydanticSerializationError:
            name = getattr(value, "name", None) or getattr(value, "__qualname__", type(value).__qualname__)
            return {"object": str(name)}

    def __getstate__(self) -> dict[Any, Any]:
        """Raises `NotPicklableError` for a scorer object, or a hook that pickle cannot find by its name."""
        if not isinstance(self.scorer, str):
            name = getattr(self.scorer, "name", type(self.scorer).__name__)
            raise NotPicklableError(
                f"guard.scorer: {name!r} is an object of this process", hint="name a scorer, or build it over there"
            )
        try:
            pickle.dumps(self.on_event)
        except Exception as error:
            raise NotPicklableError(
                f"guard.on_event: the hook cannot be pickled: {error}", hint="use a function of a module"
            ) from error
        return super().__getstate__()

    @property
    def most_alpha(self) -> float:
        """The strongest alpha of the ladder."""
        return max((rung.alpha for rung in self.ladder), default=0.0)


class DecodingParams(StrictModel):
    """How one request is decoded. Raises `InvalidParamsError` for a bad value, with its field and bound."""

    alpha: Annotated[float, Field(ge=0, le=100)] = 3.0
    """Strength of the contrast (paper: α). 0 is the plain model, served without a detoxifier row."""
    calm_share: Annotated[float, Field(gt=0, le=1)] = 1 / 6
    """Share of alpha used behind a prompt in which the embedded scorer finds nothing toxic. 1 is all of it, always."""
    rule: Rule = "bounded"
    """How the views are mixed (`steering.contrast`). "detoxigen" is the paper's, in probability space. "dexperts" is
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
    trace_top: Annotated[int, Field(ge=0, le=20)] = 0
    """Keep so many of the most probable tokens of each step too, by the distribution that its token was drawn from. It
    needs `trace`."""
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


class EngineConfig(StrictModel):
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
    """What the cache may take: its lanes times the slots of the longest. A lane holds a row, or the rows of a request
    that share its prompt. A request that would exceed it waits for others to leave, so one long prompt cannot fill the
    memory."""
    prefill_chunk: Annotated[int, Field(ge=16)] = 512
    """The most prompt tokens computed between two decoding steps. Where others wait, a chunk takes about a fifth of a
    second at most, so that a long prompt holds up neither running streams nor short prompts."""
    prompt_cache_slots: Annotated[int, Field(ge=0)] = 4096
    """K/V slots kept of prompts that were computed lately, so that the same prompt again costs nothing, and one that
    begins alike (a chat that goes on, the same documents) only what is new. 0 is none."""
    pack_weights: bool = True
    """On a CPU in float32 or bfloat16, hold linear layers in oneDNN's blocked layout, which makes the second row nearly
    free; in bfloat16, weights that came from 4-bit numbers in 4 bits besides. The backbone's `nn.Linear` modules are
    replaced."""
    drafts: Annotated[int, Field(ge=0, le=64)] = 3
    """The most tokens of a draft. Where the last tokens of a reply stand once more in prompt or reply, what followed
    there is computed along with them, and kept as far as it is then chosen: text that quotes comes faster. Only where
    the model takes a few tokens at little more than the cost of one. What is chosen does not depend on it, but for
    rounding in 16 bits. 0 is off."""
    cuda_graphs: bool = False
    """On a CUDA device, record the engine's own step as CUDA graphs and replay them. It has never run on a GPU yet."""
