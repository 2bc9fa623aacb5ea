"""One reply as text: what an engine's tokens become, with figures. Knows text and traces; knows no rows, no threads."""

from __future__ import annotations

import secrets
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from detox_guard.engine import Ended, Finish, Request, Rewind, TokenStep
from detox_guard.strength import strength_behind
from detox_guard.text import Prompt, StopMatcher, TextStream, encode_prompt, prompt_texts
from detox_guard.trace import Intervention, TokenTrace, Trace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from detox_guard.backbone import Backbone
    from detox_guard.params import DecodingParams

__all__ = ["Chunk", "Generation", "Reply", "Steering", "Usage"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request. Virtual tokens are not counted: the caller neither wrote nor reads them.

    `discarded_tokens` were decoded and taken back by a guard; they are in none of the other counts. How far decoding
    ran ahead of a verdict depends on timing, so this figure (and no other) may differ between equal runs.
    """

    prompt_tokens: int
    completion_tokens: int
    discarded_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Steering:
    """How a reply was steered: means over its tokens, in nats (`detox_guard.engine.types.TokenStep`)."""

    alpha: float
    """As used behind this prompt (`DecodingParams.calm_share`), before a guard raised it."""
    rule: str
    detoxifiers: tuple[str, ...]
    mean_kl_detoxifier: float
    mean_kl_steering: float
    replaced_tokens: int
    """Tokens where the plain model's first choice was another."""
    fallbacks: int


@dataclass(frozen=True)
class Generation:
    """A whole reply. `finish_reason`: "stop" (end token, stop string, stop id, end of the grammar), "length", "guard".

    Under a grammar the text is whole only if that is "stop"; "guard" may have put its replacement into it.
    """

    text: str
    finish_reason: Finish
    usage: Usage
    seed: int
    """The seed that repeats this reply, drawn if none was given."""
    trace: Trace | None
    """None if `DecodingParams.trace` is off."""
    steering: Steering
    interventions: tuple[Intervention, ...] = ()
    """What the guard did, in order; empty without one, and where nothing was flagged."""
    guard: str | None = None
    """Name of the scorer by which a guard judged all of it before it was released; None without a guard."""

    def summary(self) -> dict[str, Any]:
        """A small JSON-able record of how this reply was steered and guarded, for logs and response metadata."""
        record = asdict(self.steering) | {"seed": self.seed, "finish_reason": self.finish_reason}
        record["discarded_tokens"] = self.usage.discarded_tokens
        record["guard"] = self.guard
        record["interventions"] = [intervention.to_dict() for intervention in self.interventions]
        return record

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a streamed reply. The last one carries the whole `generation`; its own `text` may be empty."""

    text: str
    generation: Generation | None = None

    @property
    def finish_reason(self) -> Finish | None:
        """None until the last chunk."""
        return self.generation.finish_reason if self.generation else None

    def __str__(self) -> str:
        return self.text


class Reply:
    """One request's text. An engine `Sink`: its `on_…` methods run on the engine's thread; `put` hands chunks over."""

    guard: str | None = None

    def __init__(
        self,
        backbone: Backbone,
        prompt: Prompt,
        params: DecodingParams,
        detoxifiers: Sequence[str] = (),
        check_fits: Callable[[list[int], DecodingParams], object] | None = None,
    ) -> None:
        """`check_fits(prompt_ids, params)` raises for what is too long, before anything is scored."""
        prompt_ids = encode_prompt(backbone, prompt)
        if check_fits is not None:
            check_fits(prompt_ids, params)
        params = params.replace(alpha=strength_behind(prompt_texts(prompt), params))
        end_ids = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else backbone.eos_token_ids)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        constraint = None
        if params.grammar is not None:
            from detox_guard.constraint import compile_grammar

            constraint = compile_grammar(params.grammar, backbone, params.max_new_tokens)
        self.request = Request(prompt_ids, params, seed, end_ids, self, constraint=constraint)
        self.params = params
        self.put: Callable[[Chunk | Exception], object] = lambda item: None
        self._tokenizer = backbone.tokenizer
        self._detokenizer = TextStream(backbone.tokenizer, prompt_ids)
        self._matcher = StopMatcher(params.stop)
        self._detoxifiers = tuple(detoxifiers) if self.request.steered else ()
        self._pieces: list[str] = []
        self._steps: list[tuple[TokenStep, str]] = []
        self._interventions: list[Intervention] = []
        self._discarded = 0

    @property
    def refused(self) -> bool:
        """Nothing is to be decoded."""
        return False

    def on_token(self, step: TokenStep) -> Ended | Rewind | None:
        self._emit(self._matcher.push(self._take(step)))
        return Ended("stop") if self._matcher.stopped else None

    def on_end(self, reason: Finish) -> Ended | Rewind | None:
        return Ended(reason)

    def on_finish(self, reason: Finish) -> None:
        tail = self._matcher.flush()
        if tail:
            self._pieces.append(tail)
        self.put(Chunk(tail, self._generation(reason)))

    def on_error(self, error: Exception) -> None:
        self.put(error)

    def _take(self, step: TokenStep) -> str:
        """Book one token; the text that it completes."""
        text = self._detokenizer.push(step.token_id)
        self._steps.append((step, text))
        return text

    def _emit(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            self.put(Chunk(text))

    def _generation(self, reason: Finish) -> Generation:
        text = "".join(self._pieces)
        steps = [step for step, _ in self._steps]
        count = max(1, len(steps))
        steering = Steering(
            alpha=self.params.alpha,
            rule=self.params.rule,
            detoxifiers=self._detoxifiers,
            mean_kl_detoxifier=sum(step.kl_detoxifier for step in steps) / count,
            mean_kl_steering=sum(step.kl_steering for step in steps) / count,
            replaced_tokens=sum(step.preferred_id != step.token_id for step in steps),
            fallbacks=sum(step.fallback for step in steps),
        )
        usage = Usage(len(self.request.prompt_ids), len(steps), self._discarded)
        trace = self._trace(len(text)) if self.params.trace else None
        taken = tuple(self._interventions)
        return Generation(text, reason, usage, self.request.seed, trace, steering, taken, self.guard)

    def _trace(self, length: int) -> Trace:
        """Every token's figures; their texts joined are the reply's, so a stop string is cut off here too."""
        tokens = []
        for step, text in self._steps:
            cut = text[: max(0, length)]
            length -= len(text)
            preferred = str(self._tokenizer.decode([step.preferred_id], clean_up_tokenization_spaces=False))
            tokens.append(
                TokenTrace(
                    text=cut,
                    token_id=step.token_id,
                    p_before=step.p_before,
                    p_after=step.p_after,
                    kl_detoxifier=step.kl_detoxifier,
                    kl_steering=step.kl_steering,
                    clipped_mass=step.clipped_mass,
                    fallback=step.fallback,
                    preferred=preferred,
                    preferred_id=step.preferred_id,
                    preferred_p=step.preferred_p,
                )
            )
        return Trace(tuple(tokens), tuple(self._interventions))
