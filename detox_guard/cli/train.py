"""`detox-guard train`: options to `TrainingConfig`, a bar, and the held-out losses. Knows nothing of how it is done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from detox_guard.cli import options, session
from detox_guard.cli.console import EXIT_INTERRUPTED, print_json, stderr_console, stdout_console
from detox_guard.cli.measure import quiet_libraries
from detox_guard.training.config import TrainingConfig

if TYPE_CHECKING:
    from rich.table import Table

    from detox_guard.detoxifiers.card import DetoxifierCard
    from detox_guard.detoxifiers.soft_prompt import Detoxifier

__all__ = ["losses_table", "train"]


@options.config_options(TrainingConfig, leave=options.NEEDS_TORCH)
def train(as_json: options.Json = False, **fields: Any) -> None:
    """Train a detoxifier: a soft prompt for a frozen backbone, on toxic text. Needs the extra `train`.

    Stopped with Ctrl-C or cut off, the same command goes on from the last checkpoint.
    """
    config = TrainingConfig(**options.given(fields))
    try:
        with session.needs_extra("train", "training"):
            detoxifier = _run(config)
    except KeyboardInterrupt:
        stderr_console().print("\nstopped; the same command goes on from the last checkpoint", style="dim")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if as_json:
        print_json(detoxifier.card.model_dump_json())
        return
    console = stdout_console()
    console.print(losses_table(detoxifier.card))
    console.print(f"Saved in {config.output}", markup=False, soft_wrap=True)


def _run(config: TrainingConfig) -> Detoxifier:
    if config.model is None:
        from detox_guard.models.default import default_backbone_dir

        default_backbone_dir()  # has its own bar
    quiet_libraries()
    from detox_guard._progress import Progress
    from detox_guard.training import train_detoxifier

    with Progress(True) as bars, bars.stage("training", config.steps) as stage:

        def step(done: int, steps: int, loss: float) -> None:
            stage.say(f"loss {loss:.3f}" if done < steps else "measuring")
            stage.at(done)

        return train_detoxifier(config, progress=step)


def losses_table(card: DetoxifierCard) -> Table:
    """Held-out losses of toxic replies before and after, by kind of context."""
    from rich import box
    from rich.table import Table

    table = Table(title="Held-out loss of toxic replies, nats a token", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("context")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    for kind, after in card.heldout_loss_after.items():
        before = card.heldout_loss_before.get(kind)
        first = "" if before is None else f"{before:.3f}"
        change = "" if before is None else f"{after - before:+.3f}"
        table.add_row(kind, first, f"{after:.3f}", change, style="bold" if kind == "mean" else None)
    return table
