"""One reply: its request (ids, strength, grammar), and the text and figures that an engine's tokens become.

Knows prompts, text and traces; knows no rows and no threads.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from detox_guard._adaptive import adaptive_alpha
from detox_guard.engine import End, Finish, Go, PromptIds, Request, Rewind, Sampling, TokenStep, Verdict
from detox_guard.results import Chunk, Generation, Intervention, Steering, TokenTrace, TopToken, Trace, Usage
from detox_guard.text.prompts import Prompt, StopMatcher, TextStream, encode_prompt, prompt_texts, with_system_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

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
            keep_distributions=params.trace and params.trace_top > 0,
        )
        self.params = params
        self.put: Callable[[Chunk | Exception], object] = lambda item: None
        self._vocabulary = _Vocabulary(backbone.tokenizer, ids[-1:])
        self._detokenizer = TextStream(backbone.tokenizer, ids)
        self._matcher = StopMatcher(params.stop)
        self._detoxifiers = speaker.detoxifiers if prompt_ids.steered else ()
        self._pieces: list[str] = []
        self._steps: list[tuple[TokenStep, str]] = []
        self._told: list[TokenTrace] = []
        """Figures of the first of these, whose text is out."""
        self._told_chars = self._out_chars = 0
        """How long their text is; and all that is out."""
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
        self._keep(tail)
        self._finish(tail, reason)

    def on_error(self, error: Exception) -> None:
        self.put(error)

    def _take(self, step: TokenStep) -> str:
        """Book one token; the text that it completes."""
        text = self._detokenizer.push(step.token_id)
        if step.distribution is not None:  # as wide as the vocabulary, at worst: the best of it are enough
            ids, p = step.distribution
            best = p.topk(min(self.params.trace_top, len(p)))
            step = replace(step, distribution=(ids[best.indices], best.values))
        self._steps.append((step, text))
        return text

    def _emit(self, text: str) -> None:
        if text:
            self._keep(text)
            self.put(Chunk(text, tokens=self._figures()))

    def _keep(self, text: str) -> None:
        self._pieces.append(text)
        self._out_chars += len(text)

    def _finish(self, text: str, reason: Finish) -> None:
        """The last chunk, with what is left of the figures."""
        told = len(self._told)
        generation = self._generation(reason)
        self.put(Chunk(text, generation, tuple(self._told[told:])))

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
        self._figures(last=reason != "guard")  # a guard's end: what did not come out was taken back
        taken = tuple(self._interventions)
        trace = Trace(tuple(self._told), taken) if self.params.trace else None
        return Generation(text, reason, usage, self.request.seed, trace, steering, taken, self.guard)

    def _figures(self, *, last: bool = False) -> tuple[TokenTrace, ...]:
        """Figures of the tokens whose text came out since they were asked for; of all the others where nothing comes
        any more. Their texts joined are the reply's, so a stop string is cut off here too."""
        if not self.params.trace:
            return ()
        told, end = len(self._told), self._told_chars
        left = self._out_chars - end
        upto = len(self._steps) if last else told
        for at, (_, text) in enumerate(self._steps[told:], start=told + 1):
            end += len(text)
            if text and end <= self._out_chars:
                upto, self._told_chars = max(upto, at), end
            elif text:
                break
        for step, text in self._steps[told:upto]:
            self._told.append(self._vocabulary.told(step, text[: max(0, left)]))
            left -= len(text)
        return tuple(self._told[told:])


class _Vocabulary:
    """Texts of single tokens, as they stand behind another token: some tokenizers drop a leading space."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: tuple[int, ...]) -> None:
        self._tokenizer, self._before = tokenizer, before
        self._texts: dict[int, str] = {}

    def text_of(self, token_id: int) -> str:
        if token_id not in self._texts:
            before, now = (
                str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
                for ids in (self._before, (*self._before, token_id))
            )
            self._texts[token_id] = now[len(before) :]
        return self._texts[token_id]

    def told(self, step: TokenStep, text: str) -> TokenTrace:
        """The figures of a token that completed `text`."""
        ids, p = ([], []) if step.distribution is None else (each.tolist() for each in step.distribution)
        return TokenTrace(
            text=text,
            token_id=step.token_id,
            p_before=step.p_before,
            p_after=step.p_after,
            kl_detoxifier=step.kl_detoxifier,
            kl_steering=step.kl_steering,
            clipped_mass=step.clipped_mass,
            fallback=step.fallback,
            preferred=self.text_of(step.preferred_id),
            preferred_id=step.preferred_id,
            preferred_p=step.preferred_p,
            top=tuple(TopToken(self.text_of(i), i, one) for i, one in zip(ids, p, strict=True) if one > 0),
        )
