"""Bars with time left, on stderr where that is a terminal. Knows rich; knows no work. No other live line may run."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Progress", "Stage"]


class Stage:
    """One bar under way."""

    def __init__(self, update: Callable[..., Any]) -> None:
        self._update = update

    def tick(self, steps: int = 1) -> None:
        """So many more are done."""
        self._update(advance=steps)

    def at(self, done: int) -> None:
        """So many are done."""
        self._update(completed=done)

    def say(self, what: str) -> None:
        """What is worked on now, or how it goes."""
        self._update(what=what)

    def name(self, name: str) -> None:
        """What the bar is called from now on."""
        self._update(description=name)


class Progress:
    """A context in which stages show their bars; silent without `wanted` or a terminal. `passing` bars vanish at the
    end."""

    def __init__(self, wanted: bool = True, *, passing: bool = False) -> None:
        self._bars: Any = None
        if wanted and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bars = progress.Progress(
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(bar_width=24),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TextColumn("[dim]left"),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[what]}", style="dim", markup=False),
                console=Console(stderr=True),
                speed_estimate_period=300,
                transient=passing,
            )

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[Stage]:
        """A bar that begins at what an earlier run has `done`."""
        if self._bars is None:
            yield Stage(lambda **_: None)
            return
        task = self._bars.add_task(name, total=total, completed=done, what="")
        yield Stage(lambda **change: self._bars.update(task, **change))
