"""`detox-guard demo`, `bench`, `eval`, `report`: thin fronts of what measures.

Know options, no figures.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detox_guard._files import prepare_file
from detox_guard.cli import options, session
from detox_guard.cli.console import print_json, stdout_console
from detox_guard.errors import InvalidParamsError
from detox_guard.evaluation.config import BenchConfig, EvalConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from detox_guard.evaluation.methods import Recipe

__all__ = ["bench", "demo", "evaluate", "measure", "quiet_libraries", "report", "show"]


@options.loading_options
def demo(
    output: Annotated[Path, typer.Option(help="The HTML page to write.")] = Path("out/demo.html"),
    alpha: Annotated[float, typer.Option(help="Strength of the steering.")] = 3.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest reply.")] = 32,
    seed: Annotated[int, typer.Option(help="Of all replies.")] = 0,
    model: options.Model = None,
    detoxifier: options.Detoxifiers = None,
    **fields: Any,
) -> None:
    """Eight provoking beginnings, continued plain, steered and guarded side by side, with toxicity scores."""
    from detox_guard.cli.demo import run_demo
    from detox_guard.settings import DecodingParams, GuardPolicy

    params = DecodingParams(alpha=alpha, max_new_tokens=max_new_tokens, seed=seed, guard=GuardPolicy())
    prepare_file(output)
    with session.load_model(model, detoxifier, **options.loading(fields)) as loaded:
        run_demo(loaded, params, output, stdout_console())


@options.config_options(BenchConfig)
def bench(as_json: options.Json = False, **fields: Any) -> None:
    """Speed of steered and guarded decoding against the plain model."""
    from detox_guard.evaluation.bench import run_bench

    quiet_libraries()
    with session.spinner("Measuring"):
        result = run_bench(**options.given(fields))
    show(result, as_json)
    if not as_json:
        print_json(result.to_json())


@options.config_options(EvalConfig)
def evaluate(
    rescore: Annotated[
        bool, typer.Option("--rescore", help="Judge the stored replies of --output again; decode nothing.")
    ] = False,
    list_methods: Annotated[bool, typer.Option("--list-methods", help="What --method may be, and leave.")] = False,
    as_json: options.Json = False,
    **fields: Any,
) -> None:
    """Toxicity, perplexity and diversity of several ways of decoding, side by side on your prompts."""
    from detox_guard.evaluation.methods import METHODS

    measure(METHODS, rescore, list_methods, as_json, options.given(fields))


def measure(
    table: Mapping[str, Recipe], rescore: bool, list_methods: bool, as_json: bool, asked: dict[str, Any]
) -> None:
    """What `eval` does, with these methods."""
    from detox_guard.evaluation import run

    if list_methods:
        print("\n".join(f"{name:16} {recipe.words}" for name, recipe in table.items()))
        return
    quiet_libraries()
    # Both have bars of their own, so no spinner runs here: two at once would fight for the line.
    if rescore:
        output = asked.pop("output", None)
        if output is None:
            raise InvalidParamsError("--output", None, "the folder of a whole run, for --rescore")
        show(run.rescore(Path(output), **asked), as_json)
    else:
        show(run.run_eval(table=table, **asked), as_json)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders that eval has finished.")],
    output: Annotated[Path, typer.Option(help="Folder for the page, its pictures and a table.")] = Path("out/report"),
    examples: Annotated[int, typer.Option(min=0, help="Prompts of each class shown with their replies.")] = 6,
) -> None:
    """One page about finished evaluations: toxicity against fluency, categories, steps, examples."""
    from detox_guard.evaluation.report import write_report

    print(write_report(runs, output, examples=examples))


def quiet_libraries() -> None:
    """No bars of the libraries' own: ours would fight them for the line."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def show(result: Any, as_json: bool) -> None:
    """A report as one line of JSON, or as a table."""
    if as_json:
        print_json(result.to_json())
    else:
        stdout_console().print(result.table())
