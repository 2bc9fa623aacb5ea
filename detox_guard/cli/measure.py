"""`detox-guard demo`, `bench` and `eval`: thin fronts of what measures. Know options; know no figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from detox_guard.cli import options, session
from detox_guard.cli.console import prepare_file, stdout_console

__all__ = ["bench", "demo", "evaluate"]


def demo(
    output: Annotated[Path, typer.Option(help="The HTML page to write.")] = Path("out/demo.html"),
    alpha: Annotated[float, typer.Option(help="Strength of the steering.")] = 2.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest reply.")] = 32,
    seed: Annotated[int, typer.Option(help="Of all replies.")] = 0,
    model: options.Model = None,
    detoxifier: options.Detoxifiers = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Eight provoking beginnings, continued plain and guarded side by side, with toxicity scores."""
    from detox_guard.demo import run_demo
    from detox_guard.params import DecodingParams

    params = DecodingParams(alpha=alpha, max_new_tokens=max_new_tokens, seed=seed)
    prepare_file(output)
    guard = session.load_guard(model, detoxifier, device=device, dtype=dtype)
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
    """Speed of guarded decoding against the plain model."""
    from detox_guard.evaluation.bench import run_bench

    _quiet_libraries()
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
    _print(result, as_json)


def evaluate(
    prompts: Annotated[Path, typer.Option(help="RealToxicityPrompts-style rows, .jsonl.")],
    model: options.Model = None,
    detoxifier: Annotated[str | None, typer.Option(help="Folder or hub id; else the shipped one.")] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    judges: Annotated[list[str] | None, typer.Option("--judge", help="A scorer; repeat for several.")] = None,
    alphas: Annotated[list[float] | None, typer.Option("--alpha", help="A strength; repeat for several.")] = None,
    rules: Annotated[list[str] | None, typer.Option("--rule", help="A formula; repeat for several.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Replies a prompt.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest reply.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Toxic prompts, and non-toxic ones, taken.")] = None,
    plausibility: Annotated[float | None, typer.Option(help="As in generate, for every system.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of all replies.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus of all replies.")] = None,
    batch_rows: Annotated[int | None, typer.Option(min=2, help="Rows of the running batch.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the choice of prompts and of the replies.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for what was measured.")] = None,
    as_json: options.Json = False,
) -> None:
    """Toxicity, perplexity and diversity of guarded and plain text on your prompts."""
    from detox_guard.evaluation.report import run_eval

    asked = options.given(
        {
            "model": model,
            "detoxifier": detoxifier,
            "device": device,
            "dtype": dtype,
            "judges": judges and tuple(judges),
            "alphas": alphas and tuple(alphas),
            "rules": rules and tuple(rules),
            "samples": samples,
            "max_new_tokens": max_new_tokens,
            "limit": limit,
            "plausibility": plausibility,
            "temperature": temperature,
            "top_p": top_p,
            "batch_rows": batch_rows,
            "seed": seed,
            "output": output,
        }
    )
    _quiet_libraries()
    _print(run_eval(prompts=prompts, **asked), as_json)  # it has bars of its own


def _quiet_libraries() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def _print(result: Any, as_json: bool) -> None:
    if as_json:
        print(result.to_json())
    else:
        stdout_console().print(result.table())
