"""The picture of a training run. Knows the Trainer's log and matplotlib."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["draw_loss_curve"]


def draw_loss_curve(log: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Training loss by step as a PNG at `path`, whole or not at all. `log` is the Trainer's `state.log_history`."""
    entries = [entry for entry in log if "loss" in entry]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: its state and its backend are the caller's
    axes = figure.subplots()
    axes.plot([entry["step"] for entry in entries], [entry["loss"] for entry in entries], linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss of the toxic replies (nats a token)")
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.new")
    figure.savefig(unfinished, format="png", dpi=120)
    os.replace(unfinished, path)
