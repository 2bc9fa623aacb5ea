"""`detox-guard demo`, `bench`, `eval`, `report`: thin fronts of what measures.

Know options, no figures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from detox_guard._files import prepare_file
from detox_guard.cli import options, session
from detox_guard.cli.console import print_json, stdout_console
from detox_guard.errors import InvalidParamsError

__all__ = ["bench", "demo", "evaluate", "quiet_libraries", "report", "show"]


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
    guard = session.load_model(model, detoxifier, **options.loading(fields))
    with guard:
        run_demo(guard, params, output, stdout_console())


def bench(
    model: Annotated[
        str | None, typer.Option(help="As in generate, or random-llama:135m, :1b, :8b; else the default model.")
    ] = None,
    detoxifier: Annotated[str | None, typer.Option(help='Folder, hub id, or "random"; else the shipped one.')] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    tokens: Annotated[int, typer.Option(min=2, help="New tokens of a reply.")] = 64,
    context: Annotated[int, typer.Option(min=1, help="Prompt tokens of the long-context case.")] = 600,
    runs: Annotated[int, typer.Option(min=1, help="Repetitions; the median counts.")] = 5,
    streams: Annotated[int, typer.Option(min=1, help="Requests at once in the batched case.")] = 8,
    quick: Annotated[bool, typer.Option("--quick", help="A fraction of the work, for a first look.")] = False,
    as_json: options.Json = False,
) -> None:
    """Speed of steered and guarded decoding against the plain model."""
    from detox_guard.evaluation.bench import run_bench

    quiet_libraries()
    with session.spinner("Measuring"):
        result = run_bench(
            model=model,
            detoxifier=detoxifier,
            device=device,
            dtype=dtype,
            tokens=tokens,
            context=context,
            runs=runs,
            streams=streams,
            quick=quick,
        )
    show(result, as_json)
    if not as_json:
        print_json(result.to_json())


def evaluate(
    prompts: Annotated[
        str | None, typer.Option(help="File (.jsonl, .csv, .tsv, .json, .txt) or hub set org/name[:split].")
    ] = None,
    field: Annotated[
        str | None, typer.Option(help="Column of the text; else prompt, text, comment or context.")
    ] = None,
    words: Annotated[int | None, typer.Option(min=1, help="Only the first words of each text.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts are user turns, through the chat template.")] = False,
    passages: Annotated[
        Path | None, typer.Option(help="Neutral text before each question, as in retrieval; implies --chat.")
    ] = None,
    passage_tokens: Annotated[int | None, typer.Option(min=1, help="How much of it (default 600).")] = None,
    model: options.Model = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model on the hub.")] = None,
    detoxifier: Annotated[str | None, typer.Option(help="Folder or hub id; else the shipped one.")] = None,
    expert: Annotated[str | None, typer.Option(help="A second, non-toxic soft prompt, for dexperts-expert.")] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    methods: Annotated[
        list[str] | None, typer.Option("--method", help="What is measured beside plain; repeat. See --list-methods.")
    ] = None,
    alphas: Annotated[list[float] | None, typer.Option("--alpha", help="A strength; repeat for several.")] = None,
    plausibility: Annotated[float | None, typer.Option(help="The floor of the methods that have one.")] = None,
    banned_words: Annotated[Path | None, typer.Option(help="A word a line, for banned-words.")] = None,
    judges: Annotated[list[str] | None, typer.Option("--judge", help="A toxicity scorer; repeat for several.")] = None,
    lm_judges: Annotated[
        list[str] | None, typer.Option("--lm-judge", help="Another causal model for perplexity; repeat.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Replies a prompt (default 25).")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest reply (default 20).")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of all replies (default 1).")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus of all replies (default .9).")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts taken of each class (default 100).")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the choice of prompts and of the replies.")] = None,
    batch_rows: Annotated[int | None, typer.Option(min=2, help="Rows of the running batch.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run; a run cut off is taken up there.")] = None,
    rescore: Annotated[
        bool, typer.Option("--rescore", help="Judge the stored replies of --output again; decode nothing.")
    ] = False,
    list_methods: Annotated[bool, typer.Option("--list-methods", help="What --method may be, and leave.")] = False,
    as_json: options.Json = False,
) -> None:
    """Toxicity, perplexity and diversity of several ways of decoding, side by side on your prompts."""
    from detox_guard.evaluation import harness
    from detox_guard.evaluation.methods import METHODS

    if list_methods:
        print("\n".join(f"{name:16} {words}" for name, words in METHODS.items()))
        return
    judging = options.given(
        {
            "judges": judges and tuple(judges),
            "lm_judges": lm_judges and tuple(lm_judges),
            "device": device,
            "dtype": dtype,
        }
    )
    decoding = options.given(
        {
            "prompts": prompts,
            "field": field,
            "words": words,
            "chat": chat or None,
            "passages": passages,
            "passage_tokens": passage_tokens,
            "model": model,
            "revision": revision,
            "detoxifier": detoxifier,
            "expert": expert,
            "methods": methods and tuple(methods),
            "alphas": alphas and tuple(alphas),
            "plausibility": plausibility,
            "banned_words": banned_words,
            "samples": samples,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "limit": limit,
            "seed": seed,
            "batch_rows": batch_rows,
        }
    )
    quiet_libraries()
    # Both have bars of their own, so no spinner runs here: two at once would fight for the line.
    if rescore:
        if output is None or decoding:
            given = ", ".join(decoding) or None
            raise InvalidParamsError("--rescore", given, "--output, --judge, --lm-judge, --device and --dtype only")
        show(harness.rescore(output, **judging), as_json)
        return
    if prompts is None:
        raise InvalidParamsError("--prompts", None, "a file or a hub data set")
    show(harness.run_eval(**decoding, **judging, **options.given({"output": output})), as_json)


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
