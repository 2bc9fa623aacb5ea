"""Plain and guarded replies side by side. Knows pairs, scores and rich tables; knows no model and no options."""

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

__all__ = ["Pair", "make_pairs", "pair_table", "score_pairs", "show_pairs", "summary", "trace_sections", "worst_of"]

BETTER = 0.02
"""A smaller difference of two scores is within what the scorer can tell."""


@dataclass
class Pair:
    """One prompt, decoded without and with steering from one seed, and the scores of the texts.

    Where a guard is asked for, `guarded` is steered and guarded, and `steered` is steering alone.
    """

    plain: Exchange
    guarded: Exchange
    plain_score: float | None = None
    guarded_score: float | None = None
    steered: Exchange | None = None
    steered_score: float | None = None

    @property
    def replies(self) -> list[Exchange]:
        """What is to be decoded, in the order shown."""
        return [reply for reply in (self.plain, self.steered, self.guarded) if reply is not None]

    @property
    def whole(self) -> bool:
        return all(reply.generation is not None for reply in self.replies)

    @property
    def gain(self) -> float:
        """How much less toxic the guarded text is; 0 where there is no score."""
        return (self.plain_score or 0.0) - (self.guarded_score or 0.0)


def make_pairs(prompts: Sequence[Prompt], params: Sequence[DecodingParams]) -> list[Pair]:
    """Every prompt with alpha 0, and as asked; where that has a guard, without it too."""
    return [
        Pair(
            Exchange(prompt, own.replace(alpha=0.0, guard=None)),
            Exchange(prompt, own),
            steered=Exchange(prompt, own.replace(guard=None)) if own.guard else None,
        )
        for prompt, own in zip(prompts, params, strict=True)
    ]


def score_pairs(pairs: Sequence[Pair], scorer: ToxicityScorer) -> None:
    """Score the texts of all whole pairs. Raises `ScorerError`."""
    from detox_guard.scorers.base import checked_scores

    whole = [pair for pair in pairs if pair.whole]
    scores = iter(checked_scores(scorer, [reply.text for pair in whole for reply in pair.replies]))
    for pair in whole:
        pair.plain_score = next(scores)
        pair.steered_score = next(scores) if pair.steered else None
        pair.guarded_score = next(scores)


def worst_of(pairs: Sequence[Pair]) -> Pair:
    """The most toxic reply of each column, of scored pairs to one prompt: what counts in expected maximum toxicity."""
    plain = max(pairs, key=lambda pair: pair.plain_score or 0.0)
    steered = max(pairs, key=lambda pair: pair.steered_score or 0.0)
    guarded = max(pairs, key=lambda pair: pair.guarded_score or 0.0)
    return Pair(
        plain.plain,
        guarded.guarded,
        plain.plain_score,
        guarded.guarded_score,
        steered.steered,
        steered.steered_score,
    )


def show_pairs(console: Console, pairs: Sequence[Pair]) -> None:
    """Each pair under its prompt, then a legend."""
    from rich.text import Text

    for number, pair in enumerate(pairs, 1):
        label = f"{number}. " if len(pairs) > 1 else ""
        words = visible(prompt_text(pair.guarded.prompt))
        console.print(Text.assemble((label, "dim"), (words, "bold italic")))
        console.print(pair_table(pair))
        console.print()
    console.print(legend())


def pair_table(pair: Pair) -> Table:
    """Columns of equal width: plain, steered if there is a guard, guarded."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, expand=True, show_footer=pair.guarded_score is not None, padding=(0, 1))
    done = pair.guarded.generation
    alpha = f"α {done.steering.alpha if done else pair.guarded.params.alpha:.3g}"
    last = _footer(pair.guarded_score)
    note = _verdict(pair)
    if note is not None and pair.guarded_score is not None:
        last.append_text(note)
    columns = [("plain", _footer(pair.plain_score)), (f"guarded · {alpha}{_taken_back(pair.guarded)}", last)]
    if pair.steered is not None:
        columns.insert(1, (f"steered · {alpha}", _footer(pair.steered_score)))
    for name, footer in columns:
        table.add_column(name, footer, ratio=1, overflow="fold", header_style="dim")
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
    scored = [pair for pair in pairs if pair.guarded_score is not None]
    if not scored:
        return "Nothing to compare."
    plain = sum(pair.plain_score or 0.0 for pair in scored) / len(scored)
    guarded = sum(pair.guarded_score or 0.0 for pair in scored) / len(scored)
    better = sum(pair.gain > BETTER for pair in scored)
    worse = sum(pair.gain < -BETTER for pair in scored)
    same = len(scored) - better - worse
    line = f"Mean toxicity [bold]{plain:.2f}[/] plain → [bold]{guarded:.2f}[/] guarded"
    if len(scored) > 1:
        counts = [f"{better} of {len(scored)} got better"]
        counts += [f"{same} stayed the same"] * bool(same) + [f"{worse} got worse"] * bool(worse)
        line += f"; {', '.join(counts)}"
    return line + "."


def trace_sections(pairs: Sequence[Pair]) -> list[tuple[str, str, object]]:
    """What `detox_guard.html.trace_page` takes: the replies of every whole pair."""
    sections: list[tuple[str, str, object]] = []
    for pair in pairs:
        for name, reply, score in (
            ("plain", pair.plain, pair.plain_score),
            ("steered", pair.steered, pair.steered_score),
            ("guarded", pair.guarded, pair.guarded_score),
        ):
            if reply is None:
                continue
            if reply.generation is not None and reply.generation.trace is not None:
                caption = name if score is None else f"{name}, toxicity {score:.2f}"
                sections.append((prompt_text(reply.prompt), caption, reply.generation.trace))
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
