"""Plain, steered and guarded replies side by side. Knows pairs, scores and tables; knows no model and no options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from detox_guard.cli.console import score_text, tinted, visible
from detox_guard.cli.prompts import prompt_text
from detox_guard.cli.session import Exchange

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

    from detox_guard.scorers.base import ToxicityScorer
    from detox_guard.settings import DecodingParams
    from detox_guard.text.prompts import Prompt

__all__ = [
    "Pair",
    "Side",
    "make_pairs",
    "pair_table",
    "score_pairs",
    "show_pairs",
    "summary",
    "trace_sections",
    "worst_of",
]

BETTER = 0.02
"""A smaller difference of two scores is within what the scorer can tell."""


@dataclass
class Side:
    """One way of decoding a prompt: "plain", "steered", or "guarded" (steered under a guard)."""

    name: str
    reply: Exchange
    score: float | None = None


@dataclass
class Pair:
    """One prompt, decoded from one seed: plain first, then steered, then guarded where a guard is asked for."""

    sides: list[Side]

    @property
    def plain(self) -> Side:
        return self.sides[0]

    @property
    def asked(self) -> Side:
        """What the user asked for: the last one."""
        return self.sides[-1]

    @property
    def replies(self) -> list[Exchange]:
        """What is to be decoded, in the order shown."""
        return [side.reply for side in self.sides]

    @property
    def whole(self) -> bool:
        return all(reply.generation is not None for reply in self.replies)

    @property
    def gain(self) -> float:
        """How much less toxic the last one is than the plain one; 0 where there is no score."""
        return (self.plain.score or 0.0) - (self.asked.score or 0.0)


def make_pairs(prompts: Sequence[Prompt], params: Sequence[DecodingParams]) -> list[Pair]:
    """Every prompt with alpha 0, and as asked; where that has a guard, without it too."""
    pairs = []
    for prompt, own in zip(prompts, params, strict=True):
        ways = {"plain": own.replace(alpha=0.0, guard=None), "steered": own.replace(guard=None)}
        ways |= {"guarded": own} if own.guard else {}
        pairs.append(Pair([Side(name, Exchange(prompt, way)) for name, way in ways.items()]))
    return pairs


def score_pairs(pairs: Sequence[Pair], scorer: ToxicityScorer) -> None:
    """Score the texts of all whole pairs. Raises `ScorerError`."""
    from detox_guard.scorers.base import checked_scores

    sides = [side for pair in pairs if pair.whole for side in pair.sides]
    for side, score in zip(sides, checked_scores(scorer, [side.reply.text for side in sides]), strict=True):
        side.score = score


def worst_of(pairs: Sequence[Pair]) -> Pair:
    """The most toxic reply of each column, of scored pairs to one prompt: what counts in expected maximum toxicity."""
    columns = zip(*(pair.sides for pair in pairs), strict=True)
    return Pair([max(column, key=lambda side: side.score or 0.0) for column in columns])


def show_pairs(console: Console, pairs: Sequence[Pair]) -> None:
    """Each pair under its prompt, then a legend."""
    from rich.text import Text

    for number, pair in enumerate(pairs, 1):
        label = f"{number}. " if len(pairs) > 1 else ""
        words = visible(prompt_text(pair.plain.reply.prompt))
        console.print(Text.assemble((label, "dim"), (words, "bold italic")))
        console.print(pair_table(pair))
        console.print()
    console.print(legend())


def pair_table(pair: Pair) -> Table:
    """Columns of equal width: plain, steered, and guarded if there is a guard."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, expand=True, show_footer=pair.asked.score is not None, padding=(0, 1))
    for side in pair.sides:
        heading, footer = side.name, _footer(side.score)
        if side is not pair.plain:
            done = pair.asked.reply.generation
            alpha = done.steering.alpha if done else side.reply.params.alpha
            heading += f" · α {alpha:.3g}{_taken_back(side.reply)}"
        if side is pair.asked and side.score is not None and (note := _verdict(pair)):
            footer.append_text(note)
        table.add_column(heading, footer, ratio=1, overflow="fold", header_style="dim")
    table.add_row(*map(_body, pair.replies))
    return table


def _taken_back(reply: Exchange) -> str:
    """How often the guard took something back, for a heading."""
    events = reply.generation.interventions if reply.generation else ()
    rewinds = sum(event.action == "rewind" for event in events)
    return f" · {rewinds} rewind{'s' * (rewinds != 1)}" if rewinds else ""


def legend() -> Text:
    from rich.text import Text

    return Text.assemble(
        ("Tinted", "#1c1b1a on rgb(243,182,130)"),
        (": steered, the deeper the harder. ", "dim"),
        ("Underlined", "#1c1b1a on rgb(243,182,130) underline"),
        (": the plain model preferred another token here.", "dim"),
    )


def summary(pairs: Sequence[Pair]) -> str:
    """Mean scores, and honestly how many pairs got better, stayed the same, or got worse; rich markup."""
    scored = [pair for pair in pairs if pair.asked.score is not None]
    if not scored:
        return "Nothing to compare."
    plain = sum(pair.plain.score or 0.0 for pair in scored) / len(scored)
    asked = sum(pair.asked.score or 0.0 for pair in scored) / len(scored)
    better = sum(pair.gain > BETTER for pair in scored)
    worse = sum(pair.gain < -BETTER for pair in scored)
    same = len(scored) - better - worse
    line = f"Mean toxicity [bold]{plain:.2f}[/] plain → [bold]{asked:.2f}[/] {scored[0].asked.name}"
    if len(scored) > 1:
        counts = [f"{better} of {len(scored)} got better"]
        counts += [f"{same} stayed the same"] * bool(same) + [f"{worse} got worse"] * bool(worse)
        line += f"; {', '.join(counts)}"
    return line + "."


def trace_sections(pairs: Sequence[Pair], *, compare: bool = True) -> list[tuple[str, str, object]]:
    """What `detox_guard.html.trace_page` takes: all replies of these pairs, or only what was asked for."""
    sections: list[tuple[str, str, object]] = []
    for side in (side for pair in pairs for side in (pair.sides if compare else [pair.asked])):
        done = side.reply.generation
        if done is not None and done.trace is not None:
            caption = side.name if side.score is None else f"{side.name}, toxicity {side.score:.2f}"
            sections.append((prompt_text(side.reply.prompt), caption, done.trace))
    return sections


def _body(reply: Exchange) -> RenderableType:
    from rich.text import Text

    if reply.error is not None:
        return Text(f"failed: {visible(str(reply.error))}", "red")
    if reply.generation is None:
        return Text.assemble(visible(reply.text), (" … cut off", "dim"))
    shown = tinted(reply.generation.trace, reply.text)
    return shown if reply.text.strip() else Text("(empty)", "dim")


def _footer(score: float | None) -> Text:
    from rich.text import Text

    return Text() if score is None else Text.assemble(("toxicity ", "dim"), score_text(score))


def _verdict(pair: Pair) -> Text | None:
    from rich.text import Text

    if pair.gain > BETTER:
        return None
    return Text("  worse here" if pair.gain < -BETTER else "  no better here", "yellow")
