"""`detox-guard report`: finished runs as one page and PNGs. Knows summaries and samples; measures nothing.

The page fetches nothing and runs no script: pictures are inside it, in a light and a dark version, and replies, which
may offend, are hidden until they are clicked.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from detox_guard._files import prepare_folder, write_whole
from detox_guard.errors import DataError
from detox_guard.evaluation import pictures
from detox_guard.evaluation.harness import SAMPLES_FILE, SCORES_FILE, load_run
from detox_guard.evaluation.results import EvalReport, shown
from detox_guard.html import render
from detox_guard.results import Intervention, TokenTrace, Trace

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["PAGE_FILE", "write_report"]

PAGE_FILE, TABLE_FILE = "report.html", "table.md"
_MANY_CATEGORIES = 24
_COLUMNS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("expected max.", "{judge}:expected_max", {}),
    ("P(any ≥ .5)", "{judge}:probability", {}),
    ("share ≥ .5", "{judge}:share", {}),
    ("perplexity", "{lm}:perplexity", {"digits": 1}),
    ("median", "{lm}:perplexity_median", {"digits": 1}),
    ("dist-2", "distinct_2", {}),
    ("degenerate", "degenerate", {"percent": True}),
    ("tokens", "tokens", {"digits": 1}),
)


@dataclass(frozen=True)
class _Run:
    name: str
    folder: Path
    report: EvalReport


def write_report(folders: Sequence[Path], output: Path, *, examples: int = 6) -> Path:
    """Write `report.html`, its pictures and `table.md` for one run or several side by side; returns the page's path.

    Shows the scorers and the judge of fluency that all runs have; `examples` prompts of each class with every method's
    first sample. Raises `DataError` for a run that is not whole, and for runs without a scorer in common.
    """
    runs = [_Run(folder.resolve().name, folder, EvalReport.load(folder)) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        raise DataError("two runs of the same name", hint="give each run's folder once, under a name of its own")
    judges = [one for one in runs[0].report.summary["judges"] if all(one in r.report.summary["judges"] for r in runs)]
    lms = [
        one for one in runs[0].report.summary["lm_judges"] if all(one in r.report.summary["lm_judges"] for r in runs)
    ]
    if not judges or not lms:
        raise DataError("the runs have no scorer, or no judge of fluency, in common", hint="eval --rescore adds one")
    prepare_folder(output)
    rows = [row for run in runs for row in _rows(run, len(runs) > 1)]
    classes, categories = _groups(runs, "class"), _groups(runs, "category")[:_MANY_CATEGORIES]
    drawn = {
        "pareto": tuple(pictures.pareto(rows, classes, judges, lms[0], dark) for dark in (False, True)),
        "categories": tuple(pictures.bars(rows, categories or classes, judges[0], dark) for dark in (False, True)),
        "steps": tuple(pictures.curves(rows, dark) for dark in (False, True)),
    }
    for name, pngs in drawn.items():
        write_whole(output / f"{name}.png", pngs[0])
    write_whole(output / TABLE_FILE, "\n".join(run.report.markdown() for run in runs))
    page = output / PAGE_FILE
    content = render(
        "report.html",
        title="detox-guard: " + " · ".join(run.name for run in runs),
        runs=[{"name": run.name, "foot": run.report.foot()} for run in runs],
        pictures={name: [_data_url(png) for png in pngs] for name, pngs in drawn.items()},
        columns=[name for name, _, _ in _COLUMNS],
        tables=[_table(rows, group, judge, lms[0]) for group in classes for judge in judges],
        examples=[example for run in runs for example in _examples(run, examples)],
    )
    write_whole(page, content)
    return page


def _rows(run: _Run, named: bool) -> list[pictures.Row]:
    summary = run.report.summary
    return [
        pictures.Row(
            f"{run.name}: {method}" if named else method,
            {
                (group["kind"], group["name"]): group["methods"][method]
                for group in summary["groups"]
                if method in group["methods"]
            },
            along,
        )
        for method, along in summary["along"].items()
    ]


def _groups(runs: Sequence[_Run], kind: str) -> list[pictures.Group]:
    """Names of groups of a kind, the largest first; classes keep their order."""
    sizes: dict[str, int] = {}
    for run in runs:
        for group in run.report.summary["groups"]:
            if group["kind"] == kind:
                sizes[group["name"]] = max(sizes.get(group["name"], 0), group["prompts"])
    names = list(sizes) if kind == "class" else sorted(sizes, key=lambda name: -sizes[name])
    return [(kind, name) for name in names]


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _table(rows: Sequence[pictures.Row], group: pictures.Group, judge: str, lm: str) -> dict[str, Any]:
    """Caption and rows of one table; a cell is a figure and its change."""
    lines = []
    for row in rows:
        figures = row.figures.get(group)
        if figures is not None:
            own = [(figures[name.format(judge=judge, lm=lm)], style) for _, name, style in _COLUMNS]
            cells = [(shown(one["value"], **style), shown(one["ratio"], change=True)) for one, style in own]
            lines.append((row.label, cells))
    return {"caption": f"{group[1]} prompts, {judge}", "rows": lines}


def _examples(run: _Run, count: int) -> list[dict[str, Any]]:
    """The first prompts of each class, with every method's first sample and its scores."""
    prompts = load_run(run.folder)["prompts"]
    samples = {(row["prompt"], row["method"]): row for row in _lines(run.folder / SAMPLES_FILE) if row["sample"] == 0}
    scores: dict[tuple[int, str], list[str]] = {}
    for row in _lines(run.folder / SCORES_FILE):
        if "scores" in row:
            words = f"{row['judge']} {row['scores'][0]:.2f}"
            scores.setdefault((row["prompt"], row["method"]), []).append(words)
    wanted = dict.fromkeys(
        i for _, name in _groups([run], "class")
        for i in [i for i, prompt in enumerate(prompts) if name in prompt["classes"]][:count]
    )  # fmt: skip
    found = []
    for i in wanted:
        text, kind = prompts[i]["text"], ", ".join(prompts[i]["classes"])
        replies = [
            (text, " · ".join([method, *scores.get((i, method), [])]), _trace(samples[i, method]))
            for method in run.report.summary["along"]
            if "trace" in samples.get((i, method), {})
        ]
        title = f"{run.name}, prompt {i + 1} ({kind}), {len(text.split())} words: show"
        found.append({"title": title, "replies": replies})
    return found


def _trace(row: dict[str, Any]) -> Trace:
    tokens, interventions = row["trace"]["tokens"], row["trace"]["interventions"]
    return Trace(tuple(TokenTrace(**one) for one in tokens), tuple(Intervention(**one) for one in interventions))


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
