"""What steering did to a reply, token by token, and a page that shows it. Knows figures and text; knows no engine."""

from __future__ import annotations

import html
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["LEGEND", "STYLE", "Intervention", "TokenTrace", "Trace", "render_page", "render_section"]

_STRONG_NATS = 2.0


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
        return render_page(title, [(prompt, "", self)])


def render_page(title: str, replies: Sequence[tuple[str, str, Trace]]) -> str:
    """One page for several replies, each `(prompt, caption, trace)`."""
    body = "".join(render_section(prompt, caption, trace) for prompt, caption, trace in replies)
    name = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body><h1>{name}</h1><p class=legend>{LEGEND}</p>{body}</body></html>\n"
    )


def render_section(prompt: str, caption: str, trace: Trace) -> str:
    """One reply as a fragment for a page that has `STYLE`."""
    fallbacks = sum(token.fallback for token in trace.tokens)
    facts = [
        f"{len(trace)} tokens",
        f"KL(p‖p_gen) {trace.mean_kl_steering:.2f}",
        f"KL(p_gen‖p_detox) {trace.mean_kl_detoxifier:.2f} nats a token",
        f"{fallbacks} fallbacks",
        *([f"{len(trace.interventions)} interventions"] if trace.interventions else []),
        *([caption] if caption else []),
    ]
    lead = f"<span class=prompt>{html.escape(prompt)}</span>" if prompt else ""
    marks: dict[int, str] = {}
    for taken_back in trace.interventions:
        marks[taken_back.start] = marks.get(taken_back.start, "") + _mark(taken_back)
    tokens = "".join(marks.pop(i, "") + _span(token) for i, token in enumerate(trace.tokens)) + "".join(marks.values())
    return f"<section><p class=reply>{lead}{tokens}</p><p class=facts>{html.escape(' · '.join(facts))}</p></section>"


def _span(token: TokenTrace) -> str:
    strength = token.strength
    away = "" if not token.replaced else f"\nplain prefers {token.preferred!r} at {token.preferred_p:.3f}"
    note = (
        f"before {token.p_before:.3f}, after {token.p_after:.3f}{away}\n"
        f"KL steering {token.kl_steering:.2f}, detoxifier {token.kl_detoxifier:.2f} nats\n"
        f"clipped {token.clipped_mass:.0%}{', fallback' if token.fallback else ''}"
    )
    marks = " replaced" if token.replaced and strength > 0.02 else ""
    return (
        f'<span class="t{marks}" tabindex=0 style="--s:{strength:.2f}">{html.escape(token.text)}'
        f"<span class=tip>{html.escape(note)}</span></span>"
    )


def _mark(taken_back: Intervention) -> str:
    """Where a unit was taken back: a small sign, its figures on hover."""
    again = taken_back.next_alpha is not None
    then = f"decoded again at alpha {taken_back.next_alpha:g}" if again else taken_back.action
    banned = f"\nwithout {taken_back.banned!r}" if taken_back.banned is not None else ""
    said = f"\n{taken_back.text}" if taken_back.text is not None else ""
    note = (
        f"{taken_back.tokens} tokens taken back: score {taken_back.score:.2f} over {taken_back.threshold:.2f}\n"
        f"alpha was {taken_back.alpha:g}; {then}{banned}{said}"
    )
    return f'<span class="t back" tabindex=0>↶<span class=tip>{html.escape(note)}</span></span>'


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


LEGEND = (
    "The darker the tint, the harder the token was steered (KL from the plain model). "
    "Underlined: the plain model's first choice was another token. ↶: text that was taken back. "
    "Hover or tab for figures."
)
STYLE = """
:root{color-scheme:light dark;--ink:#1c1b1a;--paper:#fdfcfa;--soft:#77726b;--tint:230,126,34;--line:#e2ddd5}
@media(prefers-color-scheme:dark){:root{--ink:#ece8e1;--paper:#1b1a19;--soft:#9a948b;--tint:224,142,69;--line:#3a3733}}
body{font:17px/1.7 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:46rem;margin:2.5rem auto;
padding:0 1rem}
h1{font-size:1.2rem;margin:0}
.legend,.facts{color:var(--soft);font-size:.8rem;margin:.3rem 0}
section{border-top:1px solid var(--line);padding:1rem 0 .6rem;margin-top:1rem}
.reply{white-space:pre-wrap;overflow-wrap:anywhere;margin:0}
.prompt{color:var(--soft)}
.t{position:relative;background:rgba(var(--tint),calc(var(--s)*.65));border-radius:3px;outline-offset:1px}
.replaced{border-bottom:2px solid rgba(var(--tint),.9)}
.back{color:var(--soft);font-size:.8em;padding:0 .15em;cursor:help}
.t:hover,.t:focus{background:rgba(var(--tint),.85)}
.tip{display:none;position:absolute;left:0;top:1.8em;z-index:1;white-space:pre;font:12px/1.5 ui-monospace,monospace;
background:var(--ink);color:var(--paper);padding:.4rem .6rem;border-radius:6px;box-shadow:0 3px 14px rgba(0,0,0,.25)}
.t:hover .tip,.t:focus .tip{display:block}
"""
