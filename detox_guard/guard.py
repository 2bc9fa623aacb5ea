"""A reply that is checked before anyone reads it, and decoded again where it fails. Knows policy, units and verdicts.

Decoding runs ahead of the judge: while a unit is being scored the next one is decoded, and thrown away if the unit is
taken back. Which parameters decode a token depends on the path of tokens alone, never on when a verdict came; so the
same seed gives the same text.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from detox_guard.audit import audit_log, report
from detox_guard.engine import Ended, Finish, Rewind, TokenStep
from detox_guard.errors import GuardError, ScorerError
from detox_guard.judge import judge_for
from detox_guard.reply import Chunk, Reply
from detox_guard.text import prompt_texts
from detox_guard.trace import Intervention
from detox_guard.units import in_code, last_space, sentence_end

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from detox_guard.backbone import Backbone
    from detox_guard.judge import Judge
    from detox_guard.params import DecodingParams
    from detox_guard.policy import GuardPolicy
    from detox_guard.text import Prompt

__all__ = ["GuardedReply", "closed_length", "scan"]


@dataclass(frozen=True, slots=True)
class _Place:
    """State behind a token: length of the unit's text, what the stop matcher held back, and whether to cut here."""

    chars: int
    held: str
    whole: bool


@dataclass(eq=False)
class _Unit:
    """A unit under way or waiting for its verdict."""

    index: int
    start: int
    """Place of its first token in the reply."""
    held: str
    """What the stop matcher held back before it."""
    code: bool
    """It begins inside a code block."""
    text: str = ""
    places: list[_Place] = field(default_factory=list)
    rewinds: int = 0
    banned: dict[int, frozenset[int]] = field(default_factory=dict)
    """Ids that may not be chosen, by place in the reply."""
    before: str = ""
    scores: Future[list[float]] | None = None
    search: Future[list[float]] | None = None
    """Scores of its beginnings, once it was flagged."""
    deadline: float = 0.0


class GuardedReply(Reply):
    """A reply under a `GuardPolicy`. Its text goes out unit by unit, each after its verdict."""

    def __init__(
        self,
        backbone: Backbone,
        prompt: Prompt,
        params: DecodingParams,
        detoxifiers: Sequence[str] = (),
        check_fits: Callable[[list[int], DecodingParams], object] | None = None,
    ) -> None:
        assert params.guard is not None
        self.policy: GuardPolicy = params.guard
        self._judge: Judge = judge_for(self.policy.scorer)
        self.guard = self._judge.scorer.name
        if self.policy.audit_log is not None:
            audit_log(self.policy.audit_log)  # a log that cannot be written is an error now, not a line lost later
        super().__init__(backbone, prompt, params, detoxifiers, check_fits)
        if detoxifiers and self.policy.most_alpha > 0:
            self.request.steered = True
            self._detoxifiers = tuple(detoxifiers)
        self._can_steer = bool(detoxifiers)
        self._open = _Unit(0, 0, "", False)
        self._pending: deque[_Unit] = deque()
        self._path = ""  # text up to the open unit, released or not
        self._over: Finish | None = None
        if self.policy.scan_input:
            self._scan_input(prompt)

    @property
    def refused(self) -> bool:
        """The prompt itself was flagged: nothing is to be decoded."""
        return self._over == "guard"

    # -- the engine's calls

    def on_token(self, step: TokenStep) -> Ended | Rewind | None:
        unit = self._open
        unit.text += self._matcher.push(self._take(step))
        unit.places.append(_Place(len(unit.text), self._matcher.held, self._detokenizer.whole))
        verdict = self._poll()
        if verdict is None and self._matcher.stopped:
            verdict = Ended("stop")
        if verdict is None:
            self._cut()
        self._set_course()
        return verdict

    def on_end(self, reason: Finish) -> Ended | Rewind | None:
        if self._over == "guard":
            return Ended("guard")
        if self._over is None:
            self._open.text += self._matcher.flush()
            self._close(self._open, len(self._open.places), len(self._open.text))
            self._over = reason
        verdict = self._poll()
        if isinstance(verdict, Rewind):
            self._over = None
            self._set_course()
            return verdict
        return verdict or (None if self._pending else Ended(reason))

    def on_finish(self, reason: Finish) -> None:
        unread = "".join(self._pieces) if self._interventions and self._interventions[0].unit < 0 else ""
        self.put(Chunk(unread, self._generation(reason)))

    # -- units

    def _cut(self) -> None:
        """Hand the open unit to the judge if it has ended; what stands behind its end begins the next one."""
        unit = self._open
        end = closed_length(unit.text, self.policy, unit.code, len(unit.places))
        if not end:
            return
        whole = [count for count, place in enumerate(unit.places, start=1) if place.whole]
        inside = [count for count in whole if unit.places[count - 1].chars <= end and unit.places[count - 1].chars]
        # A token that reaches over the end goes with the unit: a cut lies between two tokens.
        tokens = inside[-1] if inside else (whole[-1] if whole else 0)
        if tokens and unit.text[: unit.places[tokens - 1].chars].strip():
            self._close(unit, tokens, unit.places[tokens - 1].chars)

    def _close(self, unit: _Unit, tokens: int, chars: int) -> None:
        rest, later = unit.text[chars:], unit.places[tokens:]
        held = unit.places[tokens - 1].held if tokens else unit.held
        unit.text, unit.places = unit.text[:chars], unit.places[:tokens]
        unit.before = self._path[-self.policy.context_chars :] if self.policy.context_chars else ""
        if unit.text:
            texts = [unit.text] + [unit.before + unit.text] * bool(unit.before)
            unit.scores, unit.deadline = self._judge.submit(texts), self._deadline()
            self._pending.append(unit)
        self._path += unit.text
        self._open = _Unit(unit.index + 1, unit.start + tokens, held, in_code(unit.text, unit.code), rest)
        self._open.places = [replace(place, chars=place.chars - chars) for place in later]

    def _poll(self) -> Ended | Rewind | None:
        """Release what was found fit, in order; deal with the first unit that was not."""
        while self._pending:
            unit = self._pending[0]
            scores = self._scores(unit, unit.scores)
            if scores is None:
                return None
            score = max(scores)
            if score <= self.policy.threshold:
                self._emit(unit.text)
                self._pending.popleft()
                continue
            if unit.rewinds >= self.policy.max_rewinds or not unit.places:
                return self._exhaust(unit, score)
            if unit.search is None:
                beginnings = [unit.before + unit.text[: place.chars] for place in unit.places]
                unit.search, unit.deadline = self._judge.submit(beginnings), self._deadline()
            beginnings_scores = self._scores(unit, unit.search)
            return None if beginnings_scores is None else self._take_back(unit, score, beginnings_scores)
        return None

    def _scores(self, unit: _Unit, scores: Future[list[float]] | None) -> list[float] | None:
        """The judge's answer, None while it is out. Raises `ScorerError`."""
        assert scores is not None
        if scores.done():
            return scores.result()
        if time.monotonic() > unit.deadline:
            raise ScorerError(
                f"scorer {self._judge.scorer.name!r} gave no answer in {self.policy.scorer_timeout_s:g} s",
                hint="raise GuardPolicy.scorer_timeout_s",
            )
        return None

    def _deadline(self) -> float:
        return time.monotonic() + self.policy.scorer_timeout_s

    # -- what happens to a flagged unit

    def _take_back(self, unit: _Unit, score: float, beginnings: list[float]) -> Rewind:
        """Rewind to the unit's start, climb the ladder, and ban the word with which the unit left the safe path."""
        over = next((i for i, value in enumerate(beginnings) if value > self.policy.threshold), len(beginnings) - 1)
        place = self._word_start(unit, over)
        step, text = self._steps[unit.start + place]
        alpha = self._alpha(unit)
        unit.rewinds += 1
        at = unit.start + place
        unit.banned[at] = unit.banned.get(at, frozenset()) | {step.token_id}
        self._book(unit, score, "rewind", alpha, self._alpha(unit), text)
        tokens = self._forget(unit)
        unit.text, unit.places, unit.scores, unit.search = "", [], None, None
        self._open = unit
        return Rewind(tokens)

    def _exhaust(self, unit: _Unit, score: float) -> Ended:
        action = self.policy.on_exhausted
        self._book(unit, score, action, self._alpha(unit), None, None)
        if action == "raise":
            raise GuardError(
                f"unit {unit.index} scored {score:.2f}, over {self.policy.threshold:g}, after {unit.rewinds} rewinds",
                hint="a higher ladder, more rewinds, or on_exhausted='replace'",
            )
        self._forget(unit)
        if action == "replace" and unit.index < 0:
            self._pieces.append(self.policy.replacement)  # nobody listens yet: `on_finish` hands it over
        elif action == "replace":
            self._emit(_joined("".join(self._pieces), self.policy.replacement))
        self._over = "guard"
        return Ended("guard")

    def _forget(self, unit: _Unit) -> int:
        """Drop the unit and all behind it; how many tokens that were."""
        tokens = len(self._steps) - unit.start
        if tokens:
            self._detokenizer.rewind(tokens)
            del self._steps[unit.start :]
        self._matcher.rewind(unit.held)
        self._discarded += tokens
        self._pending.clear()
        self._path = "".join(self._pieces)
        return tokens

    def _word_start(self, unit: _Unit, token: int) -> int:
        """The token with which the word of `token` begins: banning the rest of a word would only misspell it."""
        while token > 0 and not self._steps[unit.start + token][1][:1].isspace():
            before = self._steps[unit.start + token - 1][1]
            if before and not before[-1].isalnum():
                break
            token -= 1
        return token

    def _book(
        self, unit: _Unit, score: float, action: str, alpha: float, next_alpha: float | None, banned: str | None
    ) -> None:
        event = Intervention(
            unit=unit.index,
            start=unit.start,
            tokens=len(unit.places),
            score=score,
            threshold=self.policy.threshold,
            alpha=alpha,
            next_alpha=next_alpha,
            action=action,  # type: ignore[arg-type]
            banned=banned if self.policy.keep_discarded else None,
            text=unit.text if self.policy.keep_discarded else None,
        )
        self._interventions.append(event)
        report(self.policy, event, self.request.seed)

    # -- how the open unit is decoded

    def _set_course(self) -> None:
        """The parameters and bans of the token to come."""
        unit, place = self._open, len(self._steps)
        self.request.params = self._params(unit)
        self.request.banned = unit.banned.get(place, frozenset())

    def _alpha(self, unit: _Unit) -> float:
        return self._params(unit).alpha

    def _params(self, unit: _Unit) -> DecodingParams:
        if not unit.rewinds or not self.policy.ladder or not self._can_steer:
            return self.params
        rung = self.policy.ladder[min(unit.rewinds, len(self.policy.ladder)) - 1]
        return self.params.replace(
            alpha=max(rung.alpha, self.params.alpha),
            rule=rung.rule or self.params.rule,
            temperature=self.params.temperature if rung.temperature is None else rung.temperature,
        )

    def _scan_input(self, prompt: Prompt) -> None:
        """Score the prompt before anything is decoded. Raises `ScorerError`, and `GuardError` where the policy says."""
        score = scan(prompt_texts(prompt), self.policy)
        if score > self.policy.threshold:
            self._exhaust(_Unit(-1, 0, "", False), score)


def closed_length(text: str, policy: GuardPolicy, code: bool, tokens: int) -> int:
    """Length of the unit that `text` (of `tokens` tokens) begins with; 0 while it is still open."""
    if policy.unit == "sentence":
        end = sentence_end(text, code)
        if end:
            return end
        longest = policy.max_unit_tokens
    else:
        longest = policy.unit
    if tokens < longest:
        return 0
    # Before the last word, which may still grow; a text that is one long word is cut where it stands.
    at = last_space(text)
    return at if text[:at].strip() else (len(text) if tokens >= 2 * longest else 0)


def scan(texts: Sequence[str], policy: GuardPolicy) -> float:
    """The highest score of `texts`, waited for. Raises `ScorerError`."""
    judge = judge_for(policy.scorer)
    try:
        return max(judge.submit([text for text in texts if text]).result(policy.scorer_timeout_s), default=0.0)
    except TimeoutError:
        raise ScorerError(
            f"scorer {judge.scorer.name!r} gave no answer in {policy.scorer_timeout_s:g} s",
            hint="raise GuardPolicy.scorer_timeout_s",
        ) from None


def _joined(text: str, replacement: str) -> str:
    """The replacement, with a space before it where text stands before it."""
    return f" {replacement}" if text and not text[-1].isspace() and replacement else replacement
