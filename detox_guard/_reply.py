"""One reply: its request (ids, strength, grammar), and the text and figures that an engine's tokens become.

Knows prompts, text and traces; knows no rows and no threads.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from detox_guard._adaptive import adaptive_alpha
from detox_guard.engine import End, Finish, Go, PromptIds, Request, Rewind, Sampling, TokenStep, Verdict
from detox_guard.results import Chunk, Generation, Intervention, Steering, TokenTrace, Trace, Usage
from detox_guard.text.prompts import Prompt, StopMatcher, TextStream, encode_prompt, prompt_texts, with_system_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from detox_guard.models.backbone import Backbone
    from detox_guard.settings import DecodingParams

__all__ = ["Reply", "Speaker"]


@dataclass(frozen=True)
class Speaker:
    """What a model is to each of its replies."""

    backbone: Backbone
    detoxifiers: tuple[str, ...] = ()
    """Their ids, for the record."""
    system_texts: tuple[str, ...] = ()
    """Of the views that read the prompt with a text in its system message."""
    check_fits: Callable[[PromptIds, int, bool], object] | None = None
    """`Engine.check`: raises for what cannot be served, before anything is scored."""


class Reply:
    """One request's text. An engine `Sink`: its `on_…` methods run on the engine's thread; `put` hands chunks over."""

    guard: str | None = None

    def __init__(self, speaker: Speaker, prompt: Prompt, params: DecodingParams) -> None:
        backbone = speaker.backbone
        may_rewind = params.guard is not None
        steered = params.alpha > 0 or (self._may_steer and bool(speaker.detoxifiers))
        contexts = [with_system_text(prompt, text) for text in speaker.system_texts] if steered else []
        ids, *own = (tuple(encode_prompt(backbone, one)) for one in (prompt, *contexts))
        prompt_ids = PromptIds(ids, steered, tuple(own))
        if speaker.check_fits is not None:
            speaker.check_fits(prompt_ids, params.max_new_tokens, may_rewind)
        params = params.replace(alpha=adaptive_alpha(prompt_texts(prompt), params))
        end_ids = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else backbone.eos_token_ids)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        constraint = None
        if params.grammar is not None:
            from detox_guard.text.llguidance import compile_grammar

            constraint = compile_grammar(params.grammar, backbone, params.max_new_tokens)
        self.request = Request(
            prompt_ids,
            Sampling.of(params),
            params.max_new_tokens,
            seed,
            end_ids,
            self,
            constraint=constraint,
            may_rewind=may_rewind,
        )
        self.params = params
        self.put: Callable[[Chunk | Exception], object] = lambda item: None
        self._tokenizer = backbone.tokenizer
        self._detokenizer = TextStream(backbone.tokenizer, ids)
        self._matcher = StopMatcher(params.stop)
        self._detoxifiers = speaker.detoxifiers if prompt_ids.steered else ()
        self._pieces: list[str] = []
        self._steps: list[tuple[TokenStep, str]] = []
        self._interventions: list[Intervention] = []
        self._discarded = 0

    @property
    def _may_steer(self) -> bool:
        """Whether a reply that begins with alpha 0 may come to be steered."""
        return False

    @property
    def refused(self) -> bool:
        """Nothing is to be decoded."""
        return False

    def on_token(self, step: TokenStep) -> Verdict:
        self._emit(self._matcher.push(self._take(step)))
        return End("stop") if self._matcher.stopped else Go()

    def on_end(self, reason: Finish) -> End | Rewind | None:
        return End(reason)

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
        usage = Usage(len(self.request.prompt.ids), len(steps), self._discarded)
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
