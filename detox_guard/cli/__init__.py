"""The command line: `detox-guard`. Knows commands, exit codes and how errors are told; each command has its own module.

Nothing here imports torch: `--help` and bad usage answer at once, and a command loads what it needs when it runs.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import detox_guard
from detox_guard.cli import adapt, chat, detoxifiers, generate, info, measure, serve, train
from detox_guard.cli.console import EXIT_INTERRUPTED, EXIT_PIPE, exit_code, report
from detox_guard.errors import DetoxGuardError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Commands", "app", "main"]

EXIT_CODES = (
    "Exit codes: 0 fine · 1 a request failed · 2 bad usage or bad input · "
    "3 the model, detoxifier or scorer could not be loaded · 130 stopped with Ctrl-C · 141 the output's reader left."
)


class Commands(TyperGroup):
    """Turns what a command raises into a line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            _drop_output()
            raise typer.Exit(EXIT_PIPE) from None
        except KeyboardInterrupt:
            print(file=sys.stderr)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except DetoxGuardError as error:
            if _debug(ctx):
                raise
            report(error)
            raise typer.Exit(exit_code(error)) from None


app = typer.Typer(
    cls=Commands,
    help="Keeps a local language model from saying toxic things, while it decodes.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"detox-guard {detox_guard.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="DETOX_GUARD_DEBUG", help="Tracebacks and the libraries' own messages.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show and exit.")
    ] = False,
) -> None:
    if not debug:
        # A failed request is told in one line; the libraries' own words come with --debug.
        logging.getLogger().addHandler(logging.NullHandler())
        os.environ.setdefault("TORCH_LOGS", "-all")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


_COMMANDS: dict[str, Callable[..., None]] = {
    "generate": generate.generate,
    "chat": chat.chat,
    "demo": measure.demo,
    "serve": serve.serve,
    "key": serve.key,
    "adapt": adapt.adapt,
    "detoxifiers": detoxifiers.detoxifiers,
    "train": train.train,
    "eval": measure.evaluate,
    "report": measure.report,
    "bench": measure.bench,
    "info": info.info,
}
for _name, _command in _COMMANDS.items():
    app.command(_name, epilog=EXIT_CODES)(_command)


def main() -> None:
    """The entry point of the `detox-guard` script."""
    if not os.environ.get("DETOX_GUARD_DEBUG") and "--debug" not in sys.argv:
        warnings.simplefilter("ignore")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows "?", and no traceback
    try:
        app()
    except KeyboardInterrupt:  # outside of any command
        sys.exit(EXIT_INTERRUPTED)
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            _drop_output()


def _debug(ctx: Any) -> bool:
    return bool(ctx.params.get("debug"))


def _drop_output() -> None:
    """Point stdout at nothing, so that Python's own flush at exit has nobody to complain to."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # not a real file: a test's buffer
        return
