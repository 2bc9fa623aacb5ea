"""Figures of runs as PNGs, for a light page or a dark one. Knows matplotlib and summaries; knows no files."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from detox_guard.errors import DetoxGuardError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Group", "Row", "bars", "curves", "pareto"]

# Okabe and Ito's, which people with any kind of colour vision can tell apart.
COLOURS = ("#777777", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A", "#542788", "#1B7837")
MARKERS, LINES = "os^Dv<>ph*", ("-", "--", ":", "-.")
INK, PAPER = {False: "#1c1b1a", True: "#ece8e1"}, {False: "#fdfcfa", True: "#1b1a19"}


Group = tuple[str, str]
"""Kind and name of a group of prompts."""


@dataclass(frozen=True)
class Row:
    """One method of one run: `figures[group][name]` as in a summary, `along[name]` its curves."""

    label: str
    figures: Mapping[Group, Mapping[str, Any]]
    along: Mapping[str, Mapping[str, Sequence[float]]]

    @property
    def family(self) -> str:
        """The method without its strength."""
        return self.label.partition(" α=")[0]


def pareto(rows: Sequence[Row], groups: Sequence[Group], judges: Sequence[str], lm: str, dark: bool) -> bytes:
    """Expected maximum toxicity against perplexity, with 95 % intervals; a panel for each scorer and class of prompts.

    Strengths of one method are joined by a line. Left and below is better.
    """
    figure, axes = _panels(len(judges), len(groups), 4.6, 3.4, dark)
    families = list(dict.fromkeys(row.family for row in rows))
    for down, judge in enumerate(judges):
        for across, group in enumerate(groups):
            panel = axes[down][across]
            for n, family in enumerate(families):
                own = [row.figures[group] for row in rows if row.family == family and group in row.figures]
                pairs = [(one[f"{lm}:perplexity"]["value"], one[f"{judge}:expected_max"]["value"]) for one in own]
                pairs = [(x, y) for x, y in pairs if x["value"] is not None and y["value"] is not None]
                xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
                if not pairs:
                    continue
                panel.errorbar(
                    [x["value"] for x in xs],
                    [y["value"] for y in ys],
                    xerr=_errors(xs),
                    yerr=_errors(ys),
                    marker=MARKERS[n % len(MARKERS)],
                    color=COLOURS[n % len(COLOURS)],
                    label=family,
                    linewidth=1,
                    elinewidth=0.7,
                    markersize=5,
                )
            low, high = panel.get_xlim()
            if high > 20 * max(low, 1.0):  # one noisy method would squeeze the others into a line
                panel.set_xscale("log")
            panel.set_title(f"{group[1]} prompts, {judge}", fontsize=9)
            panel.set_xlabel(f"perplexity ({lm})")
            panel.set_ylabel("expected maximum toxicity")
    return _png(figure, axes, dark)


def bars(rows: Sequence[Row], groups: Sequence[Group], judge: str, dark: bool) -> bytes:
    """Expected maximum toxicity with 95 % intervals by group of prompts, a bar for each method."""
    figure, axes = _panels(1, 1, 8.0, 1.2 + 0.16 * len(groups) * (len(rows) + 1), dark)
    panel = axes[0][0]
    height = 0.85 / max(1, len(rows))
    for n, (row, (colour, strength)) in enumerate(zip(rows, _looks(rows), strict=True)):
        known = [(i, row.figures[group][f"{judge}:expected_max"]["value"]) for i, group in enumerate(groups)
                 if group in row.figures]  # fmt: skip
        known = [(i, figure_) for i, figure_ in known if figure_["value"] is not None]
        panel.barh(
            [i + n * height for i, _ in known],
            [value["value"] for _, value in known],
            height,
            xerr=_errors([value for _, value in known]),
            color=colour,
            alpha=1 / (1 + 0.5 * strength),
            ecolor=INK[dark],
            error_kw={"elinewidth": 0.6},
            label=row.label,
        )
    panel.set_yticks([i + 0.85 / 2 - height / 2 for i in range(len(groups))], [name for _, name in groups])
    panel.invert_yaxis()
    panel.set_xlabel(f"expected maximum toxicity ({judge})")
    return _png(figure, axes, dark)


def curves(rows: Sequence[Row], dark: bool) -> bytes:
    """Mean divergences by token of the reply, and the middle 80 % of prompts as a band: how far the detoxifier is, and
    how hard was steered."""
    names = {"kl_detoxifier": "KL(p_gen‖p_detox), nats", "kl_steering": "KL(p‖p_gen) in the nucleus, nats"}
    figure, axes = _panels(1, 2, 4.6, 3.2, dark)
    for panel, (name, title) in zip(axes[0], names.items(), strict=True):
        for row, (colour, strength) in zip(rows, _looks(rows), strict=True):
            curve = row.along[name]
            if curve["mean"]:
                steps = range(1, len(curve["mean"]) + 1)
                style = LINES[strength % len(LINES)]
                panel.plot(steps, curve["mean"], style, color=colour, label=row.label, linewidth=1.2)
                panel.fill_between(steps, curve["low"], curve["high"], color=colour, alpha=0.1, linewidth=0)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("token of the reply")
        panel.set_ylim(bottom=0)
    return _png(figure, axes, dark)


def _looks(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """A colour for each method, the same at every strength, and which strength of it this is."""
    families = list(dict.fromkeys(row.family for row in rows))
    seen: dict[str, int] = {}
    looks = []
    for row in rows:
        strength = seen.get(row.family, 0)
        seen[row.family] = strength + 1
        looks.append((COLOURS[families.index(row.family) % len(COLOURS)], strength))
    return looks


def _panels(down: int, across: int, width: float, height: float, dark: bool) -> tuple[Any, Any]:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DetoxGuardError("pictures need matplotlib", hint='pip install "detox-guard[eval]"') from error
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK[dark])
    paper = {"axes.facecolor": PAPER[dark], "figure.facecolor": PAPER[dark], "legend.facecolor": PAPER[dark]}
    with matplotlib.rc_context({**ink, **paper, "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        # Not pyplot: no state that outlives the picture, no window.
        figure = Figure(figsize=(width * across, height * down), dpi=160, layout="constrained")
        return figure, figure.subplots(down, across, squeeze=False)


def _png(figure: Any, axes: Any, dark: bool) -> bytes:
    handles = {
        label: handle for panel in axes.flat for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    if handles:
        legend = figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8
        )
        for text in legend.get_texts():
            text.set_color(INK[dark])
    with io.BytesIO() as file:
        figure.savefig(file, format="png", metadata={"Software": None})
        return file.getvalue()


def _errors(intervals: Sequence[Mapping[str, float | None]]) -> list[list[float]]:
    """matplotlib wants distances from the point. A percentile interval may leave its point out by a hair; a bound that
    is not known is not drawn."""

    def distance(one: Mapping[str, float | None], bound: str) -> float:
        value, end = one["value"], one[bound]
        return 0.0 if value is None or end is None else max(0.0, value - end if bound == "low" else end - value)

    return [[distance(one, bound) for one in intervals] for bound in ("low", "high")]
