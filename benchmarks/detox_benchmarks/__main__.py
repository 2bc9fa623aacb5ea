"""`python -m detox_benchmarks`: what the tables of the docs are made with. Knows options, no figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from detox_benchmarks.ablations.variants import AblationConfig, What
from detox_benchmarks.methods import MoreConfig, more_methods
from detox_benchmarks.rag.frame import RagConfig, run_rag, table
from detox_benchmarks.serving.load import LoadConfig
from detox_benchmarks.serving.soak import SoakConfig
from detox_benchmarks.speed.drafts import DraftsConfig
from detox_benchmarks.speed.engines import EngineBenchConfig
from detox_benchmarks.utility.run import UtilityConfig
from detox_guard.cli import Commands, options, session
from detox_guard.cli.measure import measure, quiet_libraries, show
from detox_guard.evaluation.config import BenchConfig
from detox_guard.models.options import LoadOptions

__all__ = ["app"]

KIND: dict[str, Any] = {"cls": Commands, "no_args_is_help": True, "pretty_exceptions_enable": False}
app = typer.Typer(help="What steering is made of, and what it costs: for the docs, needed by no user.", **KIND)
rag = typer.Typer(help="Answers from documents with toxic comments among them.", **KIND)
fit = typer.Typer(help="Fit the shipped scorers, and measure one where a guard meets it.", **KIND)
app.add_typer(rag, name="rag")
app.add_typer(fit, name="fit")


@app.command("eval")
@options.config_options(MoreConfig)
def evaluate(
    rescore: Annotated[bool, typer.Option("--rescore", help="As in detox-guard eval.")] = False,
    list_methods: Annotated[bool, typer.Option("--list-methods", help="What --method may be.")] = False,
    as_json: options.Json = False,
    **fields: Any,
) -> None:
    """`detox-guard eval` with more methods: floors, an expert, a toxic prefix, politeness, banned words."""
    asked = options.given(fields)
    own = {name: asked.pop(name) for name in ("plausibility", "expert", "banned_words") if name in asked}
    measure(more_methods(**own), rescore, list_methods, as_json, asked)


@app.command()
@options.config_options(BenchConfig)
def speed(as_json: options.Json = False, **fields: Any) -> None:
    """`detox-guard bench`, and transformers' own generate beside it; --model also random-llama:135m, :1b, :8b."""
    from detox_benchmarks.speed.beside import run_speed

    quiet_libraries()
    show(run_speed(**options.given(fields)), as_json)


@app.command()
@options.config_options(EngineBenchConfig, leave=frozenset(LoadOptions.model_fields))
def engines(**fields: Any) -> None:
    """The same model in float32, bfloat16, 4 bits and on llama.cpp, and beside it what other programs take. One line of
    JSON; OMP_NUM_THREADS says how many threads torch has."""
    from detox_benchmarks.speed.engines import run_engines

    quiet_libraries()
    print(run_engines(**options.given(fields)))


@app.command()
def random_model(
    shape: Annotated[str, typer.Argument(help="135m, 1b or 8b.")],
    output: Annotated[Path, typer.Argument(help="Folder.")],
    rounded: Annotated[str, typer.Option(help="Number type of the GGUF file's matrices.")] = "Q4_0",
) -> None:
    """A Llama of some size with random weights, as a folder and as a GGUF file, for `engines --model --gguf`."""
    from detox_benchmarks.speed.random_models import write_random

    quiet_libraries()
    print(write_random(shape, output, rounded=rounded))


@app.command()
@options.config_options(LoadConfig)
def load(**fields: Any) -> None:
    """The server under many clients: errors, tokens a second, memory, refusals, what came out unscored. Prints JSON."""
    from detox_benchmarks.serving.load import run_load

    print(json.dumps(run_load(LoadConfig(**options.given(fields))), indent=2))


@app.command("ray")
def replicas(
    seconds: Annotated[float, typer.Option(min=1, help="How long each count of replicas is measured.")] = 20.0,
    clients: Annotated[int, typer.Option(min=1, help="Clients a replica.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a reply.")] = 1024,
) -> None:
    """One replica of a tiny model on Ray against two, each held to one core, in about two minutes. Needs
    ray-detox-guard. Prints JSON."""
    with session.needs_extra("ray", "Ray", of="./benchmarks"):
        from detox_benchmarks.serving.replicas import run_replicas

    print(json.dumps(run_replicas(seconds=seconds, clients=clients, tokens=tokens), indent=2))


@app.command()
@options.config_options(SoakConfig)
def soak(**fields: Any) -> None:
    """The model under a mixed load for minutes: errors, memory, seats. One line of JSON."""
    from detox_benchmarks.serving.soak import run_soak

    quiet_libraries()
    print(json.dumps(run_soak(SoakConfig(**options.given(fields)))))


@app.command()
def steps(
    model: options.Model = None,
    rounds: Annotated[int, typer.Option(min=1, help="The least of so many counts.")] = 30,
) -> None:
    """One decoding step and one prefill on a CPU: linear layers plain, packed and in 4 bits, and their distance from
    float32. One line of JSON; OMP_NUM_THREADS says how many threads."""
    from detox_benchmarks.speed.steps import run_steps

    quiet_libraries()
    print(run_steps(model, rounds))


@app.command()
@options.config_options(DraftsConfig)
def drafts(**fields: Any) -> None:
    """What drafts gain: answers about a passage, with them and without, in turn. One line of JSON."""
    from detox_benchmarks.speed.drafts import run_drafts

    quiet_libraries()
    print(run_drafts(DraftsConfig(**options.given(fields))))


@app.command()
@options.config_options(UtilityConfig)
def utility(as_json: options.Json = False, **fields: Any) -> None:
    """What steering costs where nothing is toxic: answers, language modelling, harmless mentions."""
    from detox_benchmarks.utility.run import run_utility

    quiet_libraries()
    show(run_utility(**options.given(fields)), as_json)


@app.command()
def harness(
    tasks: Annotated[list[str], typer.Option("--task", help="A task of lm-evaluation-harness; repeat.")],
    alphas: Annotated[list[float] | None, typer.Option("--alpha", help="A strength; repeat (default 0, 3).")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the documents and the replies.")] = 0,
    model: options.Model = None,
    detoxifier: options.Detoxifiers = None,
) -> None:
    """Tasks of lm-evaluation-harness, plain and steered. Needs the extra `harness`. Prints the figures as JSON."""
    with session.needs_extra("harness", "lm-evaluation-harness", of="./benchmarks"):
        from detox_benchmarks.utility.harness import run_harness
    from detox_guard import DetoxiGen

    with DetoxiGen.from_pretrained(model, detoxifier=detoxifier or None) as loaded:
        print(json.dumps(run_harness(loaded, tasks, alphas or (0.0, 3.0), limit=limit, seed=seed), default=str))


@app.command()
@options.config_options(AblationConfig, leave={"what"})
def ablate(
    what: Annotated[str, typer.Argument(help=f"One of {', '.join(get_args(What))}.")],
    as_json: options.Json = False,
    **fields: Any,
) -> None:
    """Detoxifiers that differ in one thing, trained alike and measured side by side. Needs the extra `train`."""
    from detox_benchmarks.ablations.run import run_ablation

    asked: dict[str, Any] = {"what": what, **options.given(fields)}
    asked = {name: tuple(one) if isinstance(one, list) else one for name, one in asked.items()}
    config = AblationConfig(**asked)
    quiet_libraries()
    with session.needs_extra("train", "training"):
        result = run_ablation(config)
    show(result, as_json)


@app.command()
def rank(
    run: Annotated[Path, typer.Argument(help="Folder of a finished eval run.")],
    model: options.Model = None,
    detoxifier: Annotated[str | None, typer.Option(help="Folder or hub id; else the shipped one.")] = None,
    expert: Annotated[str | None, typer.Option(help="Of --detoxifier, trained on clean text.")] = None,
    device: options.Device = None,
    method: Annotated[str, typer.Option(help="Whose replies.")] = "plain",
    words: Annotated[Path | None, typer.Option(help="A word a line: the listed ones.")] = None,
) -> None:
    """Does a detoxifier aim? Its log-ratios along the replies of a run."""
    from detox_benchmarks.diagnostics.ranking import run_ranking

    asked = {"model": model, "detoxifier": detoxifier, "expert": expert, "device": device, "words": words}
    print(run_ranking(run, method=method, **options.given(asked)).markdown())


@rag.command()
@options.config_options(RagConfig)
def langchain(**fields: Any) -> None:
    """A LangChain chain and an agent that read toxic comments."""
    from detox_benchmarks.rag.langchain import CHAINS

    print(table(run_rag(CHAINS, RagConfig(**options.given(fields)))))


@rag.command("llama-index")
@options.config_options(RagConfig)
def llama_index(**fields: Any) -> None:
    """A LlamaIndex query engine that reads toxic comments."""
    from detox_benchmarks.rag.llama_index import ENGINES

    print(table(run_rag(ENGINES, RagConfig(**options.given(fields)))))


Data = Annotated[Path, typer.Option(help="Folder of the texts; fitting.texts names its files.")]
Weights = Annotated[Path, typer.Option(help="Folder of the weights and the card.")]


@fit.command()
def linear(
    output: Weights,
    data: Annotated[Path | None, typer.Option(help="As for the others, or a file of scored rows.")] = None,
    evaluate: Annotated[list[Path] | None, typer.Option(help="A file of scored rows to measure on; repeat.")] = None,
    made_up: Annotated[
        tuple[int, int] | None, typer.Option(help="Harmless texts and insults that are made up.")
    ] = None,
) -> None:
    """The embedded scorer; without --data what is there is only measured. Prints the figures as JSON."""
    from detox_benchmarks.fitting.linear import fit as fitted

    print(json.dumps(fitted(output, data, evaluate, made_up), indent=2))


@fit.command()
def minilm(data: Data, output: Weights) -> None:
    """Adapter and head of the minilm scorer."""
    from detox_benchmarks.fitting.minilm import train

    train(data, output)


@fit.command("measure")
def measured(
    data: Data,
    scorer: Annotated[str, typer.Option(help="embedded, minilm, or a Hugging Face classifier.")] = "embedded",
    show_over: Annotated[int, typer.Option("--show", help="Harmless texts over .5 to show of each kind.")] = 0,
) -> None:
    """One scorer where a guard meets it: harmless text, disguised insults, identity words."""
    from detox_benchmarks.fitting.bench import measure_scorer

    print(measure_scorer(data, scorer, show_over))


@app.command()
def registry(
    kinds: Annotated[list[str] | None, typer.Argument(help="Types (llama, qwen3_next, …); else all.")] = None,
    into: Annotated[Path | None, typer.Option(help="A page with the marks of the table (docs/models.md).")] = None,
) -> None:
    """Which types of transformers can be steered: a tiny random model of each, held against whole forward passes."""
    from detox_benchmarks.registry.run import table, try_all, types_of, write_into

    results = []
    for part in types_of(kinds or ()):
        tried = []
        for one in try_all(part):
            typer.echo(f"{one.kind}: {one.verdict}: {one.how}" + ("" if one.error is None else f" ({one.error:.0e})"))
            tried.append(one)
        results.append(tried)
    if into is not None:
        write_into(into, table(*results))


if __name__ == "__main__":
    app()
