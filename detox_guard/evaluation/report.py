"""`detox-guard report`: finished runs as one page and PNGs. Knows summaries and samples; measures nothing.

The page fetches nothing and runs no script: pictures are inside it, in a light and a dark version, and replies, which
may offend, are hidden until they are clicked.
"""

from __future__ import annotations

import base64
import html
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from detox_guard.errors import DataError
from detox_guard.evaluation import pictures
from detox_guard.evaluation.harness import SAMPLES_FILE, SCORES_FILE, load_run
from detox_guard.evaluation.results import EvalReport, shown
from detox_guard.files import prepare_folder, write_whole
from detox_guard.trace import LEGEND, STYLE, Intervention, TokenTrace, Trace, render_section

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
    body = "".join(
        [
            *(f"<p class=facts>{html.escape(run.name)}: {html.escape(run.report.foot())}</p>" for run in runs),
            "<h2>Toxicity against fluency</h2>",
            _picture(drawn["pareto"], "Expected maximum toxicity against perplexity, with 95 % intervals"),
            *(_table(rows, group, judge, lms[0]) for group in classes for judge in judges),
            "<h2>By category</h2>",
            _picture(drawn["categories"], "Expected maximum toxicity by category, with 95 % intervals"),
            "<h2>Along the reply</h2>",
            _picture(drawn["steps"], "Divergences by token of the reply; bands hold the middle 80 % of prompts"),
            f"<h2>Examples</h2><p class=legend>These replies were not chosen, and some may offend. {LEGEND}</p>",
            *(_examples(run, examples) for run in runs),
        ]
    )
    page = output / PAGE_FILE
    write_whole(page, _page(" · ".join(run.name for run in runs), body))
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


def _picture(pngs: Sequence[bytes], words: str) -> str:
    light, dark = pngs

    def data(png: bytes) -> str:
        return f"data:image/png;base64,{base64.b64encode(png).decode()}"

    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{data(dark)}">'
        f'<img src="{data(light)}" alt="{html.escape(words)}"></picture>'
    )


def _table(rows: Sequence[pictures.Row], group: pictures.Group, judge: str, lm: str) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name, _, _ in _COLUMNS)
    lines = []
    for row in rows:
        figures = row.figures.get(group)
        if figures is None:
            continue
        cells = []
        for _, name, style in _COLUMNS:
            figure = figures[name.format(judge=judge, lm=lm)]
            value = html.escape(shown(figure["value"], **style))
            change = shown(figure["ratio"], change=True)
            cells.append(f"<td>{value}<br><small>{html.escape(change)}</small></td>")
        lines.append(f"<tr><th>{html.escape(row.label)}</th>{''.join(cells)}</tr>")
    caption = f"{group[1]} prompts, {judge}; below each figure its change from plain text, paired by prompt"
    return (
        f"<div class=wide><table><caption>{html.escape(caption)}</caption>"
        f"<tr><th></th>{head}</tr>{''.join(lines)}</table></div>"
    )


def _examples(run: _Run, count: int) -> str:
    """The first prompts of each class, hidden until clicked, with every method's first sample and its scores."""
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
        text = prompts[i]["text"]
        parts = "".join(
            render_section(text, " · ".join([method, *scores.get((i, method), [])]), _trace(samples[i, method]))
            for method in run.report.summary["along"]
            if "trace" in samples.get((i, method), {})
        )
        kind = ", ".join(prompts[i]["classes"])
        title = f"{run.name}, prompt {i + 1} ({kind}), {len(text.split())} words: show"
        found.append(f"<details><summary>{html.escape(title)}</summary>{parts}</details>")
    return "".join(found)


def _trace(row: dict[str, Any]) -> Trace:
    tokens, interventions = row["trace"]["tokens"], row["trace"]["interventions"]
    return Trace(tuple(TokenTrace(**one) for one in tokens), tuple(Intervention(**one) for one in interventions))


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _page(title: str, body: str) -> str:
    name = html.escape(f"detox-guard: {title}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}{_MORE_STYLE}</style></head>'
        f"<body><h1>{name}</h1>{body}</body></html>\n"
    )


_MORE_STYLE = """
body{max-width:78rem}
h2{font-size:1.05rem;margin:2.2rem 0 .6rem}
img{max-width:100%;height:auto}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.8rem;line-height:1.35;margin:1rem 0;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);padding:.3rem 0}
th,td{text-align:left;padding:.3rem .8rem .3rem 0;border-top:1px solid var(--line);white-space:nowrap;
vertical-align:top}
small{color:var(--soft)}
summary{cursor:pointer;padding:.4rem 0}
details{border-top:1px solid var(--line)}
details section{border:0;margin:0;padding:.4rem 0}
"""
