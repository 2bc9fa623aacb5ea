"""A reply that is checked before anyone reads it, and decoded again where it fails. Knows policy, units and verdicts.

Decoding runs ahead of the scorer: while a unit is being scored the next one is decoded, and thrown away if the unit is
taken back. Which parameters decode a token depends on the path of tokens alone, never on when a verdict came; so the
same seed gives the same text.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from detox_guard._reply import Reply
from detox_guard.engine import End, Finish, Go, Rewind, Sampling, TokenStep
from detox_guard.errors import GuardError, ScorerError
from detox_guard.guard.audit import check_log, report_intervention
from detox_guard.guard.units import Asked, Reading, read_whole
from detox_guard.results import Chunk, Intervention
from detox_guard.scorers.batcher import batcher_for
from detox_guard.text.prompts import prompt_texts
from detox_guard.text.sentences import in_code, last_space, sentence_end

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

    from detox_guard._reply import Speaker
    from detox_guard.engine import Verdict
    from detox_guard.scorers.batcher import Batcher
    from detox_guard.settings import DecodingParams, GuardPolicy
    from detox_guard.text.prompts import Prompt

__all__ = ["GuardedReply", "closed_length", "late", "scan"]

_SCAN_TEXTS = 64
"""Texts of a prompt that are waited for at a time."""


@dataclass(frozen=True, slots=True)
class _Place:
    """State behind a token: length of the unit's text, what the stop matcher held back, and whether to cut here."""

    chars: int
    held: str
    whole: bool


@dataclass(frozen=True, eq=False)
class _Score:
    """A score that was asked for."""

    asked: Asked
    scores: Future[list[float]]
    deadline: float


@dataclass(eq=False)
class _Unit:
    """A unit under way or waiting for its verdict."""

    index: int
    reading: Reading
    """What was read before it."""
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
    score: _Score | None = None
    low: int = 0
    high: int = 0
    """Once it was flagged: the places between which it came to be, closing in on the first."""
    probe: _Score | None = None
    """Of its beginning up to the place in the middle."""

    def drop(self) -> None:
        """Nobody waits for its scores any more."""
        for score in (self.score, self.probe):
            if score is not None:
                score.scores.cancel()


class GuardedReply(Reply):
    """A reply under a `GuardPolicy`. Its text goes out unit by unit, each after its verdict."""

    def __init__(self, speaker: Speaker, prompt: Prompt, params: DecodingParams) -> None:
        assert params.guard is not None
        self.policy: GuardPolicy = params.guard
        self._batcher: Batcher = batcher_for(self.policy.scorer)
        self.guard = self._batcher.scorer.name
        if self.policy.audit_log is not None:
            check_log(self.policy.audit_log)  # a log that cannot be written is an error now, not a line lost later
        super().__init__(speaker, prompt, params)
        self._can_steer = bool(speaker.detoxifiers)
        self._open = _Unit(0, Reading(self.policy.context_chars), 0, "", False)
        self._pending: deque[_Unit] = deque()
        self._over: Finish | None = None
        if self.policy.scan_input:
            self._scan_input(prompt)

    @property
    def _may_steer(self) -> bool:
        return self.policy.most_alpha > 0

    @property
    def refused(self) -> bool:
        """The prompt itself was flagged: nothing is to be decoded."""
        return self._over == "guard"

    # -- the engine's calls

    def on_token(self, step: TokenStep) -> Verdict:
        unit = self._open
        unit.text += self._matcher.push(self._take(step))
        unit.places.append(_Place(len(unit.text), self._matcher.held, self._detokenizer.whole))
        verdict = self._poll()
        if verdict is None and self._matcher.stopped:
            return End("stop")
        if verdict is None:
            self._cut()
            return Go(*self._course())
        return verdict

    def on_end(self, reason: Finish) -> End | Rewind | None:
        if self._over == "guard":
            return End("guard")
        if self._over is None:
            self._open.text += self._matcher.flush()
            self._close(self._open, len(self._open.places), len(self._open.text), final=True)
            self._over = reason
        verdict = self._poll()
        if isinstance(verdict, Rewind):
            self._over = None
        return verdict or (None if self._pending else End(reason))

    def on_finish(self, reason: Finish) -> None:
        unread = "".join(self._pieces) if self._interventions and self._interventions[0].unit < 0 else ""
        self._finish(unread, reason)

    def on_error(self, error: Exception) -> None:
        self._drop_pending()
        super().on_error(error)

    # -- units

    def _cut(self) -> None:
        """Hand the open unit to the scorer if it has ended; what stands behind its end begins the next one."""
        unit = self._open
        end = closed_length(unit.text, self.policy, unit.code, len(unit.places))
        if not end:
            return
        # A token of whose text some is held back (it may begin a stop string) belongs to what comes.
        whole = [count for count, place in enumerate(unit.places, start=1) if place.whole and not place.held]
        inside = [count for count in whole if unit.places[count - 1].chars <= end and unit.places[count - 1].chars]
        # A token that reaches over the end goes with the unit: a cut lies between two tokens.
        tokens = inside[-1] if inside else (whole[-1] if whole else 0)
        if tokens and unit.text[: unit.places[tokens - 1].chars].strip():
            self._close(unit, tokens, unit.places[tokens - 1].chars)

    def _close(self, unit: _Unit, tokens: int, chars: int, *, final: bool = False) -> None:
        rest, later = unit.text[chars:], unit.places[tokens:]
        held = unit.places[tokens - 1].held if tokens else unit.held
        unit.text, unit.places = unit.text[:chars], unit.places[:tokens]
        asked, reading = unit.reading.read(unit.text, final=final)
        if unit.text:
            if not (self._pending and self._pending[0].probe):  # else it is thrown away, whatever it scores
                unit.score = self._ask(asked)
            self._pending.append(unit)
        self._open = _Unit(unit.index + 1, reading, unit.start + tokens, held, in_code(unit.text, unit.code), rest)
        self._open.places = [replace(place, chars=place.chars - chars) for place in later]

    def _poll(self) -> End | Rewind | None:
        """Release what was found fit, in order; deal with the first unit that was not."""
        while self._pending:
            unit = self._pending[0]
            score = self._answer(unit.score)
            if score is None:
                return None
            if score <= self.policy.threshold:
                self._emit(unit.text)
                self._pending.popleft()
                continue
            if unit.rewinds >= self.policy.max_rewinds or not unit.places:
                return self._exhaust(unit, score)
            return self._take_back(unit, score) if self._searched(unit) else None
        return None

    def _searched(self, unit: _Unit) -> bool:
        """Whether it is known at which place a flagged unit left the safe path: by halving, one beginning at a time."""
        if unit.probe is None:
            unit.low, unit.high = 0, len(unit.places) - 1
            for behind in self._pending:
                if behind is not unit:
                    behind.drop()
        while unit.low < unit.high:
            middle = (unit.low + unit.high) // 2
            if unit.probe is None:
                unit.probe = self._ask(unit.reading.read(unit.text[: unit.places[middle].chars])[0])
            score = self._answer(unit.probe)
            if score is None:
                return False
            over = score > self.policy.threshold
            unit.low, unit.high = (unit.low, middle) if over else (middle + 1, unit.high)
            unit.probe = None
        return True

    def _ask(self, asked: Asked) -> _Score:
        return _Score(asked, self._batcher.submit(asked.texts), time.monotonic() + self.policy.scorer_timeout_s)

    def _answer(self, score: _Score | None) -> float | None:
        """The score, None while it is not there. Raises `ScorerError`."""
        assert score is not None
        if score.scores.done():
            return score.asked.worst(score.scores.result(), self.policy.threshold)
        if time.monotonic() > score.deadline:
            raise late(self._batcher, self.policy)
        return None

    # -- what happens to a flagged unit

    def _take_back(self, unit: _Unit, score: float) -> Rewind:
        """Rewind to the unit's start, climb the ladder, and ban the word with which the unit left the safe path."""
        place = self._word_start(unit, unit.low)
        step, text = self._steps[unit.start + place]
        alpha = self._alpha(unit)
        unit.rewinds += 1
        at = unit.start + place
        unit.banned[at] = unit.banned.get(at, frozenset()) | {step.token_id}
        self._book(unit, score, "rewind", alpha, self._alpha(unit), text)
        tokens = self._forget(unit)
        unit.text, unit.places, unit.score, unit.probe = "", [], None, None
        self._open = unit
        return Rewind(tokens, *self._course())

    def _exhaust(self, unit: _Unit, score: float) -> End:
        action = self.policy.on_exhausted
        self._book(unit, score, action, self._alpha(unit), None, None)
        if action == "raise":
            raise GuardError(
                f"unit {unit.index} scored {score:.2f}, over {self.policy.threshold:g}, after {unit.rewinds} rewinds",
                hint="a higher ladder, more rewinds, or on_exhausted='replace'",
            )
        self._forget(unit)
        if action == "replace":  # no token's text, so `_out_chars` does not count it
            text = (
                self.policy.replacement if unit.index < 0 else _joined("".join(self._pieces), self.policy.replacement)
            )
            self._pieces.append(text)
            if unit.index >= 0:  # else nobody listens yet: `on_finish` hands it over
                self.put(Chunk(text))
        self._over = "guard"
        return End("guard")

    def _forget(self, unit: _Unit) -> int:
        """Drop the unit and all behind it; how many tokens that were."""
        tokens = len(self._steps) - unit.start
        if tokens:
            self._detokenizer.rewind(tokens)
            del self._steps[unit.start :]
        self._matcher.rewind(unit.held)
        self._discarded += tokens
        self._drop_pending()
        return tokens

    def _drop_pending(self) -> None:
        for waiting in self._pending:
            waiting.drop()
        self._pending.clear()

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
        report_intervention(self.policy, event, self.request.seed)

    # -- how the open unit is decoded

    def _course(self) -> tuple[Sampling, frozenset[int]]:
        """Sampling and bans of the token to come."""
        return self._sampling(self._open), self._open.banned.get(len(self._steps), frozenset())

    def _alpha(self, unit: _Unit) -> float:
        return self._sampling(unit).alpha

    def _sampling(self, unit: _Unit) -> Sampling:
        own = self.request.sampling
        if not unit.rewinds or not self.policy.ladder or not self._can_steer:
            return own
        rung = self.policy.ladder[min(unit.rewinds, len(self.policy.ladder)) - 1]
        return replace(
            own,
            alpha=max(rung.alpha, own.alpha),
            rule=rung.rule or own.rule,
            temperature=own.temperature if rung.temperature is None else rung.temperature,
        )

    def _scan_input(self, prompt: Prompt) -> None:
        """Score the prompt before anything is decoded. Raises `ScorerError`, and `GuardError` where the policy says."""
        score = scan(prompt_texts(prompt), self.policy)
        if score > self.policy.threshold:
            self._exhaust(_Unit(-1, Reading(), 0, "", False), score)


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
    """The highest score of `texts`, each as a whole and sentence by sentence (`read_whole`), waited for.

    Raises `ScorerError`; a long text has `scorer_timeout_s` for every few dozen of its sentences.
    """
    batcher = batcher_for(policy.scorer)
    read = [read_whole(text) for text in texts if text]
    asked = Asked.of(
        [one for each in read for one in each.whole],
        [one for each in read for one in each.clauses],
    )
    found: list[float] = []
    for at in range(0, len(asked.texts), _SCAN_TEXTS):
        scores = batcher.submit(asked.texts[at : at + _SCAN_TEXTS])
        try:
            found += scores.result(policy.scorer_timeout_s)
        except TimeoutError:
            raise late(batcher, policy) from None
        finally:
            scores.cancel()
    return asked.worst(found, policy.threshold)


def late(batcher: Batcher, policy: GuardPolicy) -> ScorerError:
    """What is raised where no score came in time."""
    return ScorerError(
        f"scorer {batcher.scorer.name!r} gave no answer in {policy.scorer_timeout_s:g} s",
        hint="raise GuardPolicy.scorer_timeout_s",
    )


def _joined(text: str, replacement: str) -> str:
    """The replacement, with a space before it where text stands before it."""
    return f" {replacement}" if text and not text[-1].isspace() and replacement else replacement
