"""Tables, written once for terminals, Markdown and pages, and those of a run's summary. Knows figures only.

`summary["groups"]` lists classes and categories of prompts: `{"kind", "name", "prompts", "methods"}`, and
`methods[method][figure]` is `{"value", "difference", "ratio"}`, each `{"value", "low", "high"}` with a 95 % bootstrap
interval over prompts; difference and ratio are to plain text, paired by prompt (None for plain itself).
Figures: `<scorer>:expected_max|probability|share|mean`; `<model>:perplexity` (mean of the continuations' own, those of
1e4 and more left out, `:perplexity_dropped` their share); `distinct_1|2|3`; shares `degenerate` (of which `repeats`,
`junk`, or over 1e3), `empty`, `stopped`, `ended_by_guard`; `tokens` a reply; `kl_detoxifier`, `kl_steering`, `clipped`,
`fallbacks` a token; `tries`, `interventions` and `decoded_tokens` a reply. `along[method][kl_detoxifier|kl_steering]`:
by token of the reply the `mean`, and the 10th and 90th percentile of the prompts' own, `low` and `high`;
`ms_per_token[method]`: the batch's time over all tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from detox_guard._files import read_json
from detox_guard.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from rich.console import RenderableType

__all__ = ["SUMMARY_FILE", "EvalReport", "Sheet", "class_sheets", "markdown", "place_of", "rich_tables", "shown"]

SUMMARY_FILE = "summary.json"
STEPS_SHOWN = (1, 2, 5, 10, 20, 50, 100, 200)
Line = tuple[str, "Mapping[str, Any]", "float | None"]
"""A method's label, its figures in one group of prompts, and its milliseconds a token."""


@dataclass(frozen=True)
class Sheet:
    """One table, however it is written: the first column has names, the others figures."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def rich_tables(sheets: Iterable[Sheet], foot: str = "") -> RenderableType:
    """For a terminal."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    tables: list[RenderableType] = []
    for sheet in sheets:
        table = Table(title=escape(sheet.title), title_justify="left")
        for i, column in enumerate(sheet.columns):
            table.add_column(escape(column), justify="right" if i else "left")
        for row in sheet.rows:
            table.add_row(*map(escape, row))
        tables.append(table)
    return Group(*tables, escape(foot)) if foot else Group(*tables)


def markdown(sheets: Iterable[Sheet], foot: str = "") -> str:
    """For docs: each table under its title."""
    parts = []
    for sheet in sheets:
        lines = [sheet.columns, ["---"] * len(sheet.columns), *sheet.rows]
        cells = [
            "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
        ]
        parts.append("\n".join([f"{sheet.title}:", "", *cells] if sheet.title else cells))
    return "\n\n".join([*parts, foot] if foot else parts) + "\n"


@dataclass(frozen=True)
class EvalReport:
    """What `run_eval` measured."""

    summary: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """From a run's folder. Raises `DataError` unless the run is whole."""
        try:
            summary = read_json(folder / SUMMARY_FILE)
        except DataError as error:
            raise DataError(f"{folder}: no {SUMMARY_FILE} that can be read: {error}", hint="finish the run") from error
        if not isinstance(summary, dict) or not {"groups", "along", "judges"} <= set(summary):
            raise DataError(
                f"{folder}: its {SUMMARY_FILE} is of something else, or of an older version",
                hint="the command that made it writes it anew from what is stored",
            )
        return cls(summary)

    def to_json(self) -> str:
        """One line."""
        return json.dumps({"eval": self.summary}, ensure_ascii=False, allow_nan=False)

    def table(self) -> RenderableType:
        """For a terminal: for each class of prompts toxicity by each scorer, and what the text is worth."""
        return rich_tables(self.sheets(), self.foot())

    def markdown(self) -> str:
        """The same, for a README."""
        return markdown(self.sheets(), self.foot())

    def lines(self, kind: str, name: str, label: str = "{}") -> list[Line]:
        """The methods of one group of prompts."""
        times = self.summary["ms_per_token"]
        return [
            (label.format(method), figures, times[method])
            for group in self.summary["groups"]
            if (group["kind"], group["name"]) == (kind, name)
            for method, figures in group["methods"].items()
        ]

    def sheets(self) -> list[Sheet]:
        """Toxicity and text of each class of prompts, and how far the views differ along the reply."""
        s = self.summary
        lm = next(iter(s["lm_judges"]), "")  # none where judging was cut off
        found = [
            sheet
            for group in s["groups"]
            if group["kind"] == "class"
            for sheet in class_sheets(
                f"{group['prompts']} {group['name']} prompts", s["judges"], lm, self.lines("class", group["name"])
            )
        ]
        return found + self._along()

    def foot(self) -> str:
        """Where and how all this was measured, in a line."""
        s = self.summary
        streams = {one["sha256"][:12]: one["position"] for m in s["methods"].values() for one in m["streams"]}
        steering = ", ".join(f"{sha} ({position})" for sha, position in streams.items()) or "none"
        loaded = ", ".join(s[name] for name in ("model", "file", "dtype", "quantization", "engine") if name in s)
        return (
            f"{loaded}; detoxifier {steering}; {s['samples']} samples a prompt, seed {s['seed']}; "
            f"{place_of(s)}. In brackets: 95 % bootstrap intervals over prompts; changes are to plain text, paired by "
            "prompt."
        )

    def _along(self) -> list[Sheet]:
        """KL(p_gen‖p_detox) at some tokens of the reply: its mean, and between which values 80 % of prompts are."""
        curves = {m: along["kl_detoxifier"] for m, along in self.summary["along"].items()}
        longest = max((len(curve["mean"]) for curve in curves.values()), default=0)
        at = [step for step in STEPS_SHOWN if step <= longest]
        rows = []
        for method, curve in curves.items():
            steps = [dict(zip(("value", "low", "high"), one, strict=True)) for one in zip(
                curve["mean"], curve["low"], curve["high"], strict=True)]  # fmt: skip
            if steps:
                rows.append([method, *(shown(steps[i - 1], digits=2) if i <= len(steps) else "–" for i in at)])
        title = "KL(p_gen‖p_detox), nats [10th, 90th percentile of prompts], at token"
        return [Sheet(title, ["method", *map(str, at)], rows)] if rows else []


def class_sheets(title: str, judges: Sequence[str], lm: str, lines: Sequence[Line]) -> list[Sheet]:
    """A table of toxicity for each judge, and one of the text, with perplexity by `lm`."""
    kinds = {"expected max.": "expected_max", "P(any ≥ .5)": "probability"}
    sheets = []
    for judge in judges:
        rows = []
        for label, figures, _ in lines:
            found = [figures[f"{judge}:{kind}"] for kind in kinds.values()]
            cells = [cell for one in found for cell in (shown(one["value"]), shown(one["ratio"], change=True))]
            rows.append([label, *cells, shown(figures[f"{judge}:share"]["value"], percent=True, bare=True)])
        columns = ["method", *(cell for kind in kinds for cell in (kind, "change")), "replies ≥ .5"]
        sheets.append(Sheet(f"{title}: toxicity by {judge}", columns, rows))
    rows = []
    for label, figures, ms in lines:
        perplexity = figures.get(f"{lm}:perplexity", {"value": None, "ratio": None})
        rows.append(
            [
                label,
                shown(perplexity["value"], digits=1),
                shown(perplexity["ratio"], digits=2),
                shown(figures["distinct_2"]["value"], bare=True),
                shown(figures["degenerate"]["value"], percent=True, bare=True),
                shown(figures["tokens"]["value"], digits=1, bare=True),
                shown(figures["kl_steering"]["value"], digits=2, bare=True),
                "–" if ms is None else f"{ms:.1f}",
            ]
        )
    columns = ["method", "perplexity", "× plain", "dist-2", "broken", "tokens", "steering", "ms/token"]
    return [*sheets, Sheet(f"{title}: text", columns, rows)]


def place_of(summary: Mapping[str, Any]) -> str:
    """The GPU, or else the processor, that figures are of."""
    found: str = summary["machine"].get("gpu") or f"{summary['machine']['cpu']}, {summary['machine']['cores']} cores"
    return found


def shown(
    interval: Mapping[str, float | None] | None,
    *,
    digits: int = 3,
    percent: bool = False,
    change: bool = False,
    bare: bool = False,
) -> str:
    """`.123 [.100, .150]`; `change` shows a ratio as a signed percentage; `bare` without the interval; "–" for none."""
    if interval is None or interval["value"] is None:
        return "–"

    def number(value: float | None) -> str:
        if value is None:
            return "–"
        return f"{value - 1:+.0%}" if change else f"{value:.1%}" if percent else f"{value:.{digits}f}"

    value = number(interval["value"])
    return value if bare else f"{value} [{number(interval['low'])}, {number(interval['high'])}]"
