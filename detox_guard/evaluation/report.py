"""`detox-guard report`: finished runs as one page and PNGs. Knows summaries and samples; measures nothing.

The page fetches nothing and runs no script: pictures are inside it, in a light and a dark version, and replies, which
may offend, are hidden until they are clicked.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from detox_guard._files import prepare_folder, write_whole
from detox_guard.errors import DataError
from detox_guard.evaluation import pictures
from detox_guard.evaluation.store import KEY, SAMPLES_FILE, Journal, load_run, stored_scores
from detox_guard.evaluation.tables import EvalReport, Sheet, class_sheets
from detox_guard.html import render
from detox_guard.results import Intervention, TokenTrace, Trace

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["PAGE_FILE", "write_report"]

PAGE_FILE, TABLE_FILE = "report.html", "table.md"
_MANY_CATEGORIES = 24


@dataclass(frozen=True)
class _Run:
    name: str
    folder: Path
    report: EvalReport
    label: str
    """How one of its methods is called beside those of other runs."""


def write_report(folders: Sequence[Path], output: Path, *, examples: int = 6) -> Path:
    """Write `report.html`, its pictures and `table.md` for one run or several side by side; returns the page's path.

    Shows the scorers and the judge of fluency that all runs have; `examples` prompts of each class with every method's
    first sample. Raises `DataError` for a run that is not whole, and for runs without a scorer in common.
    """
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise DataError("two runs of the same name", hint="give each run's folder once, under a name of its own")
    runs = [
        _Run(name, folder, EvalReport.load(folder), f"{name}: {{}}" if len(names) > 1 else "{}")
        for name, folder in zip(names, folders, strict=True)
    ]
    judges, lms = ([one for one in runs[0].report.summary[kind] if all(one in r.report.summary[kind] for r in runs)]
                   for kind in ("judges", "lm_judges"))  # fmt: skip
    if not judges or not lms:
        raise DataError("the runs have no scorer, or no judge of fluency, in common", hint="eval --rescore adds one")
    prepare_folder(output)
    rows = [row for run in runs for row in _rows(run)]
    classes, categories = _groups(runs, "class"), _groups(runs, "category")[:_MANY_CATEGORIES]
    drawn = {
        "pareto": [pictures.pareto(rows, classes, judges, lms[0], dark) for dark in (False, True)],
        "categories": [pictures.bars(rows, categories or classes, judges[0], dark) for dark in (False, True)],
        "steps": [pictures.curves(rows, dark) for dark in (False, True)],
    }
    for name, pngs in drawn.items():
        write_whole(output / f"{name}.png", pngs[0])
    write_whole(output / TABLE_FILE, "\n".join(run.report.markdown() for run in runs))
    page = output / PAGE_FILE
    content = render(
        "report.html",
        title="detox-guard: " + " · ".join(names),
        runs=[{"name": run.name, "foot": run.report.foot()} for run in runs],
        pictures={name: [_data_url(png) for png in pngs] for name, pngs in drawn.items()},
        sheets=[sheet for group in classes for sheet in _sheets(runs, group, judges, lms[0])],
        examples=[example for run in runs for example in _examples(run, examples)],
    )
    write_whole(page, content)
    return page


def _rows(run: _Run) -> list[pictures.Row]:
    summary = run.report.summary
    return [
        pictures.Row(
            run.label.format(method),
            {
                (group["kind"], group["name"]): group["methods"][method]
                for group in summary["groups"]
                if method in group["methods"]
            },
            along,
        )
        for method, along in summary["along"].items()
    ]


def _sheets(runs: Sequence[_Run], group: pictures.Group, judges: Sequence[str], lm: str) -> list[Sheet]:
    """The tables of one class of prompts, all runs in them."""
    lines = [line for run in runs for line in run.report.lines(*group, run.label)]
    return class_sheets(f"{group[1]} prompts", judges, lm, lines)


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


def _examples(run: _Run, count: int) -> list[dict[str, Any]]:
    """The first prompts of each class, with every method's first sample and its scores."""
    prompts = load_run(run.folder)["prompts"]
    samples = Journal(run.folder / SAMPLES_FILE, KEY).rows
    scores: dict[tuple[int, str], list[str]] = {}
    for (judge, method, i), row in stored_scores(run.folder).items():
        if "scores" in row:
            scores.setdefault((i, method), []).append(f"{judge} {row['scores'][0]:.2f}")
    wanted = dict.fromkeys(
        i for _, name in _groups([run], "class")
        for i in [i for i, prompt in enumerate(prompts) if name in prompt["classes"]][:count]
    )  # fmt: skip
    found = []
    for i in wanted:
        text, kind = prompts[i]["text"], ", ".join(prompts[i]["classes"])
        replies = [
            (text, " · ".join([method, *scores.get((i, method), [])]), _trace(samples[method, i, 0]["trace"]))
            for method in run.report.summary["along"]
            if "trace" in samples.get((method, i, 0), {})
        ]
        title = f"{run.name}, prompt {i + 1} ({kind}), {len(text.split())} words: show"
        found.append({"title": title, "replies": replies})
    return found


def _trace(stored: dict[str, Any]) -> Trace:
    return Trace(
        tuple(TokenTrace(**one) for one in stored["tokens"]),
        tuple(Intervention(**one) for one in stored["interventions"]),
    )
