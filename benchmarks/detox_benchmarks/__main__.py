"""`python -m detox_benchmarks`: the ablations and the price of steering. Knows options, no figures.

Programs of their own: `detox_benchmarks.rag.langchain_chains`, `….rag.llama_index_engine`, `….diagnostics.ranking`.
"""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads it at run time
from typing import Annotated, Any, Literal

import typer

from detox_guard.cli import Commands, options, session
from detox_guard.cli.measure import quiet_libraries, show
from detox_guard.settings import Rule  # noqa: TC001 - typer reads it at run time

__all__ = ["app"]

app = typer.Typer(
    cls=Commands,
    help="What steering is made of, and what it costs: measured for the docs, needed by no user.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def utility(
    output: Annotated[Path, typer.Option(help="Folder of the run; a run cut off is taken up there.")],
    xquad: Annotated[Path | None, typer.Option(help="Questions in SQuAD's format, .json.")] = None,
    wikitext: Annotated[Path | None, typer.Option(help="Plain text, .txt.")] = None,
    bold: Annotated[list[Path] | None, typer.Option(help="Harmless beginnings, BOLD's .json; repeat.")] = None,
    model: options.Model = None,
    detoxifier: Annotated[str | None, typer.Option(help="Folder or hub id; else the shipped one.")] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    methods: Annotated[
        list[str] | None, typer.Option("--method", help="As in eval, of one soft prompt; repeat for several.")
    ] = None,
    alphas: Annotated[list[float] | None, typer.Option("--alpha", help="A strength; repeat for several.")] = None,
    plausibility: Annotated[float | None, typer.Option(help="The floor of the methods that have one.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions, windows and beginnings (default 200).")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Replies a beginning (default 5).")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of what is drawn and of the replies.")] = None,
    batch_rows: Annotated[int | None, typer.Option(min=2, help="Rows of the running batch.")] = None,
    as_json: options.Json = False,
) -> None:
    """What steering costs where nothing is toxic: answers, language modelling, harmless mentions."""
    from detox_benchmarks.utility.run import run_utility

    asked = options.given(
        {
            "xquad": xquad,
            "wikitext": wikitext,
            "bold": bold and tuple(bold),
            "model": model,
            "detoxifier": detoxifier,
            "device": device,
            "dtype": dtype,
            "methods": methods and tuple(methods),
            "alphas": alphas and tuple(alphas),
            "plausibility": plausibility,
            "limit": limit,
            "samples": samples,
            "seed": seed,
            "batch_rows": batch_rows,
        }
    )
    quiet_libraries()
    show(run_utility(output=output, **asked), as_json)


_TRAINING, _VARIED, _DECODING = "Training", "What is varied", "Decoding"


@app.command()
def ablate(
    what: Annotated[
        Literal["tuning", "tokens", "initial-text", "size", "sampling", "placement"],
        typer.Argument(help="Which ablation; an option that says nothing to it is refused."),
    ],
    output: Annotated[str, typer.Option(help="Folder of the run; a run cut off is taken up there.")],
    data: Annotated[
        list[str] | None, typer.Option(help="Toxic texts, as in train; repeat.", rich_help_panel=_TRAINING)
    ] = None,
    contexts: Annotated[
        list[str] | None, typer.Option(help="Neutral texts, as in train; repeat.", rich_help_panel=_TRAINING)
    ] = None,
    text_field: Annotated[str | None, typer.Option(help="Of both (default text).", rich_help_panel=_TRAINING)] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps (default 60; size 300).", rich_help_panel=_TRAINING)
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Texts a step (default 8).", rich_help_panel=_TRAINING)] = None,
    reply_tokens: Annotated[
        int | None, typer.Option(help="Longest text, in tokens (default 32).", rich_help_panel=_TRAINING)
    ] = None,
    heldout: Annotated[
        int | None, typer.Option(help="Rows that are only measured on (default 32).", rich_help_panel=_TRAINING)
    ] = None,
    mixture: Annotated[
        tuple[float, float, float, float] | None, typer.Option(help="As in train.", rich_help_panel=_TRAINING)
    ] = None,
    position: Annotated[
        Literal["front", "reply"] | None, typer.Option(help="As in train.", rich_help_panel=_TRAINING)
    ] = None,
    prompt_rate: Annotated[
        float | None, typer.Option(help="Learning rate, prompt tuning (default .02).", rich_help_panel=_TRAINING)
    ] = None,
    lora_rate: Annotated[
        float | None, typer.Option(help="tuning: of LoRA (default .001).", rich_help_panel=_VARIED)
    ] = None,
    full_rate: Annotated[
        float | None, typer.Option(help="tuning: of full fine-tuning (default .00005).", rich_help_panel=_VARIED)
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(help="tuning: default 8.", rich_help_panel=_VARIED)] = None,
    virtual_tokens: Annotated[
        list[int] | None, typer.Option(help="tokens: a length; repeat.", rich_help_panel=_VARIED)
    ] = None,
    initial_texts: Annotated[
        list[str] | None, typer.Option("--initial-text", help="initial-text: repeat.", rich_help_panel=_VARIED)
    ] = None,
    rows: Annotated[
        list[int] | None, typer.Option(help="size: training rows; repeat.", rich_help_panel=_VARIED)
    ] = None,
    passage_tokens: Annotated[
        list[int] | None, typer.Option(help="placement: a length; repeat.", rich_help_panel=_VARIED)
    ] = None,
    pairs: Annotated[
        str | None, typer.Option(help="placement: toxic and neutral texts, as in train.", rich_help_panel=_VARIED)
    ] = None,
    detoxifier: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id. sampling: else the shipped one; placement: one more row.", rich_help_panel=_VARIED
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="As in eval; non-toxic ones are left out. placement: if wanted.", rich_help_panel=_DECODING),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Prompts, or pairs (default 30).", rich_help_panel=_DECODING)
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Replies a prompt (default 4).", rich_help_panel=_DECODING)
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest reply (default 20).", rich_help_panel=_DECODING)
    ] = None,
    rule: Annotated[Rule | None, typer.Option(help="As in generate.", rich_help_panel=_DECODING)] = None,
    alphas: Annotated[
        list[float] | None,
        typer.Option("--alpha", help="Repeat (default 2; sampling 1, 2, 4).", rich_help_panel=_DECODING),
    ] = None,
    temperatures: Annotated[
        list[float] | None,
        typer.Option("--temperature", help="Repeat (default 1; sampling .7, 1).", rich_help_panel=_DECODING),
    ] = None,
    top_ps: Annotated[
        list[float] | None,
        typer.Option("--top-p", help="Repeat (default .9; sampling .9, 1).", rich_help_panel=_DECODING),
    ] = None,
    judges: Annotated[
        list[str] | None, typer.Option("--judge", help="A toxicity scorer; repeat.", rich_help_panel=_DECODING)
    ] = None,
    batch_rows: Annotated[
        int | None, typer.Option(help="Rows of the running batch.", rich_help_panel=_DECODING)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the training, the prompts and the replies.")] = None,
    model: options.Model = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Detoxifiers that differ in one thing, trained alike and measured side by side. Needs the extra `train`."""
    typed = options.given(locals())  # the first line: nothing but the options
    del typed["as_json"]
    from detox_benchmarks.ablations.run import AblationConfig, run_ablation

    fields: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in typed.items()}
    config = AblationConfig(**fields)
    quiet_libraries()
    with session.needs_extra("train", "training"):
        result = run_ablation(config)
    show(result, as_json)


if __name__ == "__main__":
    app()
