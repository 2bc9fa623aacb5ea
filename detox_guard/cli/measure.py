"""`detox-guard demo`, `bench`, `eval`, `utility`, `report`, `ablate`: thin fronts of what measures.

Know options, no figures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from detox_guard.cli import options, session
from detox_guard.cli.console import print_json, stdout_console
from detox_guard.errors import InvalidParamsError
from detox_guard.files import prepare_file
from detox_guard.policy import Rule  # noqa: TC001 - typer reads it at run time

__all__ = ["ablate", "bench", "demo", "evaluate", "report", "utility"]


def demo(
    output: Annotated[Path, typer.Option(help="The HTML page to write.")] = Path("out/demo.html"),
    alpha: Annotated[float, typer.Option(help="Strength of the steering.")] = 3.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest reply.")] = 32,
    seed: Annotated[int, typer.Option(help="Of all replies.")] = 0,
    model: options.Model = None,
    detoxifier: options.Detoxifiers = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Eight provoking beginnings, continued plain, steered and guarded side by side, with toxicity scores."""
    from detox_guard.demo import run_demo
    from detox_guard.params import DecodingParams
    from detox_guard.policy import GuardPolicy

    params = DecodingParams(alpha=alpha, max_new_tokens=max_new_tokens, seed=seed, guard=GuardPolicy())
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
    _quiet_libraries()
    # Both have bars of their own, so no spinner runs here: two at once would fight for the line.
    if rescore:
        if output is None or decoding:
            given = ", ".join(decoding) or None
            raise InvalidParamsError("--rescore", given, "--output, --judge, --lm-judge, --device and --dtype only")
        _print(harness.rescore(output, **judging), as_json)
        return
    if prompts is None:
        raise InvalidParamsError("--prompts", None, "a file or a hub data set")
    _print(harness.run_eval(**decoding, **judging, **options.given({"output": output})), as_json)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders that eval has finished.")],
    output: Annotated[Path, typer.Option(help="Folder for the page, its pictures and a table.")] = Path("out/report"),
    examples: Annotated[int, typer.Option(min=0, help="Prompts of each class shown with their replies.")] = 6,
) -> None:
    """One page about finished evaluations: toxicity against fluency, categories, steps, examples."""
    from detox_guard.evaluation.report import write_report

    print(write_report(runs, output, examples=examples))


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
    from detox_guard.evaluation.utility import run_utility

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
    _quiet_libraries()
    _print(run_utility(output=output, **asked), as_json)


_TRAINING, _VARIED, _DECODING = "Training", "What is varied", "Decoding"


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
    from detox_guard.evaluation.ablation import AblationConfig, run_ablation

    fields: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in typed.items()}
    config = AblationConfig(**fields)
    _quiet_libraries()
    with session.needs_extra("train", "training"):
        result = run_ablation(config)
    _print(result, as_json)


def _quiet_libraries() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def _print(result: Any, as_json: bool) -> None:
    if as_json:
        print_json(result.to_json())
    else:
        stdout_console().print(result.table())
