"""`detox-guard adapt`: a detoxifier for a model, from nothing.

Knows options and words; the work is `detox_guard.adapt`'s.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detox_guard.cli import options, session
from detox_guard.cli.console import EXIT_INTERRUPTED, print_json, stderr_console, stdout_console, visible
from detox_guard.training.config import AdaptConfig

if TYPE_CHECKING:
    from detox_guard.adapt import Adapted

__all__ = ["adapt"]


@options.config_options(AdaptConfig, leave={"model", *options.NEEDS_TORCH})
def adapt(
    model: Annotated[
        str | None, typer.Argument(help="Hub id, folder or .gguf file; else the embedded default model.")
    ] = None,
    as_json: options.Json = False,
    **fields: Any,
) -> None:
    """Make a detoxifier for a model: fetch rows, tune, learn from the model's own replies, measure, register.

    The next start with this model uses it. Stopped with Ctrl-C or cut off, the same command goes on where it was.
    Needs the extras `train` and `eval`.
    """
    config = AdaptConfig(model=model, **options.given(fields))
    if config.model is None:
        from detox_guard.models.default import default_backbone_dir

        default_backbone_dir()  # has its own bar
    try:
        with session.needs_extra("train,eval", "adapting"):
            made = _run(config, as_json)
    except KeyboardInterrupt:
        words = f"\nstopped; what was done is kept in {config.folder}, and the same command goes on from there"
        stderr_console().print(words, style="dim", markup=False, soft_wrap=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if as_json:
        print_json(json.dumps(_facts(made), ensure_ascii=False))
        return
    console = stdout_console()
    console.print(made.report.table())
    console.print(f"Saved in {made.folder}; registered as {made.entry.name}", markup=False, soft_wrap=True)
    if made.pushed is not None:
        console.print(f"On the hub: {made.pushed}", markup=False, soft_wrap=True)


def _run(config: AdaptConfig, quiet: bool) -> Adapted:
    from detox_guard.cli.measure import quiet_libraries

    quiet_libraries()
    from detox_guard.adapt import adapt as run

    def say(words: str) -> None:
        stderr_console().print(visible(words), style="dim", markup=False, soft_wrap=True)

    return run(config, say=say, bars=not quiet)


def _facts(made: Adapted) -> dict[str, Any]:
    """For `--json`."""
    return {
        "folder": str(made.folder),
        "registered": made.entry.name,
        "pushed": made.pushed,
        "sha256": made.entry.sha256,
        "card": made.detoxifier.card.model_dump(mode="json", exclude_none=True),
        "groups": made.report.summary["groups"],
    }
