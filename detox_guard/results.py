"""What comes back of a request: text, figures, and what steering did token by token. Plain data; knows no engine."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Chunk", "Finish", "Generation", "Intervention", "Steering", "TokenTrace", "TopToken", "Trace", "Usage"]

Finish = Literal["stop", "length", "guard"]
"""How a reply ended: an end token, stop string or stop id; `max_new_tokens`; or a guard that let no more through."""

_STRONG_NATS = 2.0


@dataclass(frozen=True, slots=True)
class TopToken:
    """One of the most probable tokens of a step; `p` is what the contrast gave it, from 0 to 1."""

    text: str
    token_id: int
    p: float


@dataclass(frozen=True, slots=True)
class TokenTrace:
    """One token of the reply. Probabilities are within the generator's nucleus (0 to 1), divergences in nats.

    `text` is what this token completed, "" inside a split character. `p_before` is what plain sampling would have
    given it, `p_after` what the contrast did. `preferred` is the plain model's own first choice and `preferred_p` its
    probability before. `kl_detoxifier` = KL(p_gen‖p_detox) over the vocabulary; `kl_steering` = KL(p‖p_gen) within the
    nucleus; `clipped_mass` the share of the nucleus that the rule removed; `fallback` that it removed all of it.
    """

    text: str
    token_id: int
    p_before: float
    p_after: float
    kl_detoxifier: float
    kl_steering: float
    clipped_mass: float
    fallback: bool
    preferred: str
    preferred_id: int
    preferred_p: float
    top: tuple[TopToken, ...] = ()
    """The most probable tokens, best first: `DecodingParams.trace_top` of them, fewer where no more could be drawn."""

    @property
    def strength(self) -> float:
        """How hard this token was steered, for a tint: 0 not at all, 1 from two nats of `kl_steering` on."""
        return min(1.0, self.kl_steering / _STRONG_NATS) if math.isfinite(self.kl_steering) else 1.0

    @property
    def replaced(self) -> bool:
        """The plain model's first choice was another token."""
        return self.preferred_id != self.token_id


@dataclass(frozen=True, slots=True)
class Intervention:
    """A unit of the reply that its guard did not let through.

    `unit` counts units from 0; `start` is the place of its first token in the reply and `tokens` how many it had.
    `action`: "rewind" (decoded again at `next_alpha`, without the token `banned`), or how the reply ended: "replace",
    "stop", "raise"; -1 as `unit` is the prompt itself. `text` is what was discarded, if the policy keeps it.
    """

    unit: int
    start: int
    tokens: int
    score: float
    threshold: float
    alpha: float
    next_alpha: float | None
    action: Literal["rewind", "replace", "stop", "raise"]
    banned: str | None = None
    text: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@dataclass(frozen=True)
class Trace:
    """All tokens of one reply, in order. `text` of the tokens joined is the reply's text.

    (Where a guard replaced the last unit, its replacement is no token's.) `interventions`: what the guard did.
    """

    tokens: tuple[TokenTrace, ...]
    interventions: tuple[Intervention, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def mean_kl_detoxifier(self) -> float:
        """Nats a token; 0 for an empty reply."""
        return _mean([token.kl_detoxifier for token in self.tokens])

    @property
    def mean_kl_steering(self) -> float:
        """Nats a token; 0 for an empty reply."""
        return _mean([token.kl_steering for token in self.tokens])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: `{"tokens": [{…}, …], "interventions": [{…}, …]}`."""
        return {
            "tokens": [asdict(token) for token in self.tokens],
            "interventions": [intervention.to_dict() for intervention in self.interventions],
        }

    def to_html(self, *, title: str = "detox-guard trace", prompt: str = "") -> str:
        """A self-contained page (no script, nothing fetched): the reply, steered tokens tinted, figures on hover."""
        from detox_guard.html import trace_page

        return trace_page(title, [(prompt, "", self)])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


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
    """How a reply was steered: means over its tokens, in nats (`detox_guard.engine.base.TokenStep`)."""

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
    """Name of the scorer by which a guard scored all of it before it was released; None without a guard."""

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
    tokens: tuple[TokenTrace, ...] = field(default=(), repr=False)
    """Figures of the tokens whose text is out with this piece. Those of all chunks, in order, are the reply's trace;
    there are none without `DecodingParams.trace`. Under a guard they are told as late as their text."""

    @property
    def finish_reason(self) -> Finish | None:
        """None until the last chunk."""
        return self.generation.finish_reason if self.generation else None

    def __str__(self) -> str:
        return self.text
