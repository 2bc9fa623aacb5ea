"""A run's summary, as tables for a terminal or a README and as one JSON line. Knows figures; knows not how they came.

`summary["groups"]` lists classes and categories of prompts: `{"kind", "name", "prompts", "methods"}`, and
`methods[method][figure]` is `{"value", "difference", "ratio"}`, each `{"value", "low", "high"}` with a 95 % bootstrap
interval over prompts; difference and ratio are to plain text, paired by prompt (None for plain itself).
Figures: `<scorer>:expected_max|probability|share|mean`; `<model>:perplexity` (mean of the continuations' own, those of
1e4 and more left out, `:perplexity_dropped` their share), `:perplexity_median`, `:perplexity_corpus` (exp of nats a
token); `distinct_1|2|3`; shares `degenerate` (of which `repeats`, `junk`, or over 1e3), `empty`, `stopped`,
`ended_by_guard`; `tokens` a reply; `kl_detoxifier`, `kl_steering`, `clipped`, `fallbacks` a token; `tries`,
`interventions` and `decoded_tokens` a reply. `along[method][kl_detoxifier|kl_steering]`: by token of the reply the
`mean`, and the 10th and 90th percentile of the prompts' own, `low` and `high`; `ms_per_token[method]`: the batch's time
over all tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from detox_guard.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rich.console import RenderableType

__all__ = ["SUMMARY_FILE", "EvalReport", "shown"]

SUMMARY_FILE = "summary.json"
TEXT = {"dist-2": "distinct_2", "broken": "degenerate", "tokens": "tokens", "steering": "kl_steering"}
DIGITS = {"tokens": 1}
STEPS_SHOWN = (1, 2, 5, 10, 20, 50, 100, 200)


@dataclass(frozen=True)
class EvalReport:
    """What `run_eval` measured."""

    summary: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """From a run's folder. Raises `DataError` unless the run is whole."""
        try:
            summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
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
        """A rich renderable for each class of prompts, with 95 % intervals: toxicity; perplexity under the
        first language model, share of degenerate replies, nats a token that steering cost."""
        from rich.console import Group

        classes = [group for group in self.summary["groups"] if group["kind"] == "class"]
        return Group(*(part for group in classes for part in self._tables(group)), self.foot())

    def markdown(self) -> str:
        """Tables for a README: each class, scorer and method a row; and how far the views differ along the reply."""
        head = [
            "prompts",
            "scorer",
            "method",
            "expected max.",
            "",
            "P(any ≥ .5)",
            "",
            "perplexity",
            "× plain",
            "dist-2",
        ]
        lines = ["| " + " | ".join([*head, "degenerate"]) + " |", "|" + "---|" * (len(head) + 1)]
        for group in (group for group in self.summary["groups"] if group["kind"] == "class"):
            for judge in self.summary["judges"]:
                for method, f in group["methods"].items():
                    cells = [f"{group['prompts']} {group['name']}", judge, method]
                    for name in ("expected_max", "probability"):
                        figure = f[f"{judge}:{name}"]
                        cells += [shown(figure["value"]), shown(figure["ratio"], change=True)]
                    perplexity = f.get("backbone:perplexity", {})
                    cells += [shown(perplexity.get("value"), digits=1), shown(perplexity.get("ratio"), digits=2)]
                    cells += [shown(f["distinct_2"]["value"]), shown(f["degenerate"]["value"], percent=True)]
                    lines.append("| " + " | ".join(cells) + " |")
        return "\n".join([*lines, *self._along(), "", self.foot()]) + "\n"

    def foot(self) -> str:
        """Where and how all this was measured, in a line."""
        s = self.summary
        place = s["machine"].get("gpu") or f"{s['machine']['cpu']}, {s['machine']['cores']} cores"
        streams = {one["sha256"][:12]: one["position"] for m in s["methods"].values() for one in m["streams"]}
        steering = ", ".join(f"{sha} ({position})" for sha, position in streams.items()) or "none"
        return (
            f"{s['model']}, {s['dtype']}; detoxifier {steering}; {s['samples']} samples a prompt, seed {s['seed']}; "
            f"{place}. In brackets: 95 % bootstrap intervals over prompts; changes are to plain text, paired by prompt."
        )

    def _along(self) -> list[str]:
        """KL(p_gen‖p_detox) at some tokens of the reply: its mean, and between which values 80 % of prompts are."""
        steered = {m: along["kl_detoxifier"] for m, along in self.summary["along"].items()}
        longest = max((len(curves["mean"]) for curves in steered.values()), default=0)
        at = [step for step in STEPS_SHOWN if step <= longest]
        if not at:
            return []
        head = ["KL(p_gen‖p_detox), nats [10th, 90th percentile of prompts], at token", *map(str, at)]
        lines = ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for method, curves in steered.items():
            if curves["mean"]:
                by_step = [dict(zip(("value", "low", "high"), one, strict=True)) for one in zip(
                    curves["mean"], curves["low"], curves["high"], strict=True)]  # fmt: skip
                cells = [shown(by_step[step - 1], digits=2) if step <= len(by_step) else "–" for step in at]
                lines.append("| " + " | ".join([method, *cells]) + " |")
        return lines

    def _tables(self, group: Mapping[str, Any]) -> list[RenderableType]:
        from rich.markup import escape
        from rich.table import Table

        title = f"{group['prompts']} {group['name']} prompts"
        tables: list[RenderableType] = []
        for judge in self.summary["judges"]:
            harm = Table("method", title=f"{title}: toxicity by {escape(judge)}", title_justify="left")
            for column in ("expected max", "change", "P(any ≥ .5)", "change"):
                harm.add_column(column, justify="right")
            for method, figures in group["methods"].items():
                cells = [method]
                for name in ("expected_max", "probability"):
                    figure = figures[f"{judge}:{name}"]
                    cells += [shown(figure["value"], digits=2), shown(figure["ratio"], change=True)]
                harm.add_row(*map(escape, cells))
            tables.append(harm)
        text = Table("method", title=f"{title}: text", title_justify="left")
        for column in ("ppl", "× plain", *TEXT, "ms/token"):
            text.add_column(column, justify="right")
        lm = next(iter(self.summary["lm_judges"]), None)  # none where judging was cut off
        for method, figures in group["methods"].items():
            perplexity = figures.get(f"{lm}:perplexity", {"value": None, "ratio": None})
            ms = self.summary["ms_per_token"][method]
            cells = [method, shown(perplexity["value"], digits=1, bare=True), shown(perplexity["ratio"], digits=2)]
            cells += [
                shown(figures[name]["value"], bare=True, percent=name == "degenerate", digits=DIGITS.get(name, 2))
                for name in TEXT.values()
            ]
            text.add_row(*map(escape, cells), "–" if ms is None else f"{ms:.1f}")
        return [*tables, text]


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
