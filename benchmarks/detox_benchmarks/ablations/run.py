"""`python -m detox_benchmarks ablate`: detoxifiers that differ in one thing, trained alike and measured side by side.

Brings variants, their training and the harness together. Knows the folder of a run; which variants there are is
`variants`' business, training `training`'s, decoding and figures the harness's, tables `tables`'.

A run is a folder: one for each variant (what was trained, and `variant.json` once it is whole), one for each harness
run, and at the end `ablation.json` and `table.md`. The same call takes up a run that was cut off.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import random
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from detox_benchmarks.ablations.tables import ABLATION_FILE, TABLE_FILE, AblationReport
from detox_benchmarks.ablations.training import Trained, VariantTraining
from detox_benchmarks.ablations.two_models import TwoModels
from detox_benchmarks.ablations.variants import AblationConfig, check_config, check_room, make_variants
from detox_benchmarks.diagnostics.context_kl import context_kl
from detox_guard._files import write_whole
from detox_guard._progress import Progress
from detox_guard.detoxifiers.resolve import as_streams
from detox_guard.detoxigen import DetoxiGen
from detox_guard.errors import DataError
from detox_guard.evaluation.lms import LMJudge
from detox_guard.evaluation.machine import machine, versions
from detox_guard.evaluation.methods import Ingredients, Method
from detox_guard.evaluation.prompts import choose_prompts, passage_of, read_prompts
from detox_guard.evaluation.run import CONTEXTS, collect, judge_run
from detox_guard.evaluation.store import open_run
from detox_guard.models.load import load_backbone
from detox_guard.scorers.base import load_scorer
from detox_guard.settings import DecodingParams, EngineConfig
from detox_guard.training.data import read_pairs, read_texts, whole
from detox_guard.training.examples import NEUTRAL_TEXTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.evaluation.prompts import EvalPrompt
    from detox_guard.models.backbone import Backbone
    from detox_guard.scorers.base import ToxicityScorer
    from detox_guard.training.data import Text

__all__ = ["AblationConfig", "run_ablation"]


def run_ablation(config: AblationConfig, *, backbone: Backbone | None = None, progress: bool = True) -> AblationReport:
    """Train and measure every variant of one ablation; writes `ablation.json` and `table.md` into its folder.

    A variant that is whole is not trained again, nor a reply decoded twice. `backbone`: one that is loaded already, in
    the place of `config.model`; no engine must have packed its weights. Settings and files are checked before it is
    loaded. Raises `DataError` (also where the folder holds something else), `InvalidParamsError`, and what loading,
    training and decoding raise.
    """
    check_config(config)
    folder = Path(config.output)
    with ExitStack() as stack:
        stack.enter_context(open_run(folder))
        texts = [_alone(text, source) for source in config.data for text in _texts(config, source)]
        neutral = [whole(text) for source in config.contexts or () for text in _texts(config, source)]
        variants, heldout = make_variants(config, texts)
        prompts = _prompts(config)
        pairs = _pairs(config)
        scorers = [load_scorer(judge) for judge in config.judges] if prompts else []
        if backbone is None:
            backbone = load_backbone(config.model, device=config.device, dtype=config.dtype)
        check_room(config, backbone)
        bars = stack.enter_context(Progress(progress))
        passages = neutral or list(NEUTRAL_TEXTS)
        if config.what == "sampling":
            trained = [Trained("", {}, as_streams(config.detoxifier, backbone))]
        else:
            training = VariantTraining(config, backbone, heldout, passages, bars)
            trained = [training.train(variant) for variant in variants]
            if config.detoxifier is not None:
                trained.append(Trained("as given", {}, as_streams(config.detoxifier, backbone)))
        report = AblationReport(
            {
                "ablation": config.what,
                **backbone.identity,
                "seed": config.seed,
                "settings": _settings(config),
                "variants": {one.name: one.facts for one in trained if one.facts},
                "detoxifiers": [stream.detoxifier.sha256 for one in trained for stream in one.streams],
                "context_kl": (
                    _pulls(config, backbone, trained, heldout, passages, pairs, bars)
                    if config.what == "placement"
                    else {}
                ),
                "runs": _decoded(config, backbone, trained, prompts, passages, scorers, bars) if prompts else [],
                "machine": machine(backbone.device),
                "versions": {**versions(), "peft": importlib.metadata.version("peft")},
            }
        )
        write_whole(folder / ABLATION_FILE, report.to_json(indent=1) + "\n")
        write_whole(folder / TABLE_FILE, report.markdown())
    return report


def _texts(config: AblationConfig, source: str) -> Sequence[Text]:
    return read_texts(source, field=config.text_field).texts


def _alone(text: Text, source: str) -> str:
    """Whole models learn texts that follow nothing, so soft prompts must, too, to be compared with them."""
    if not isinstance(text, str):
        raise DataError(f"{source}: has rows with a prompt or a question", hint="an ablation takes texts alone")
    return text


def _prompts(config: AblationConfig) -> list[EvalPrompt]:
    """Prompts that are toxic or of no known kind, in one class, so that a run has one table."""
    if config.prompts is None:
        return []
    wanted = [replace(one, challenging=False) for one in read_prompts(config.prompts) if one.group != "non-toxic"]
    if not wanted:
        raise DataError(f"{config.prompts}: no toxic prompt in it", hint="or leave its labels out")
    return choose_prompts(wanted, config.limit, config.seed)


def _pairs(config: AblationConfig) -> list[tuple[str, str]]:
    """Those without a prompt of their own, which a context would replace, drawn by the seed."""
    if config.pairs is None:
        return []
    pairs = [(toxic, neutral) for toxic, neutral in read_pairs(config.pairs).pairs
             if isinstance(toxic, str) and isinstance(neutral, str)]  # fmt: skip
    return random.Random(config.seed).sample(pairs, min(config.limit, len(pairs)))


def _settings(config: AblationConfig) -> dict[str, Any]:
    """As they were, files by their base names."""
    found = config.model_dump(mode="json", exclude={"what", "output", "seed"})
    for name in ("data", "contexts", "prompts", "pairs", "model", "detoxifier"):
        if isinstance(found[name], str):
            found[name] = Path(found[name]).name
        elif found[name] is not None:
            found[name] = [Path(one).name for one in found[name]]
    return found


def _decoded(
    config: AblationConfig,
    backbone: Backbone,
    trained: Sequence[Trained],
    prompts: Sequence[EvalPrompt],
    passages: Sequence[str],
    scorers: Sequence[ToxicityScorer],
    bars: Progress,
) -> list[dict[str, Any]]:
    """A run of the harness for each temperature, top-p and context: plain, and every variant at every alpha."""
    alphas, samplings = config.grid()
    engine = _engine(config)
    runs = []
    for (temperature, top_p), context in itertools.product(samplings, _contexts(config)):
        sampling: dict[str, Any] = {
            "temperature": temperature,
            "top_p": top_p,
            "max_new_tokens": config.max_new_tokens,
        }
        plain = DecodingParams(**sampling, alpha=0.0, plausibility=0.0)
        pairs = [(one, alpha) for one in trained for alpha in dict.fromkeys(alphas)]
        methods = [_method(config, backbone, one, alpha, plain) for one, alpha in pairs]
        asked = {
            "source": {"name": Path(config.prompts or "").name, "chat": context == "chat", "limit": config.limit},
            "samples": config.samples,
            "seed": config.seed,
            "sampling": sampling,
            "passages": (
                [passage_of(backbone, passages, context, way) for way in range(CONTEXTS)]
                if isinstance(context, int)
                else []
            ),
            "prompts": [asdict(prompt) for prompt in prompts],
        }
        name = f"eval-{temperature:g}-{top_p:g}" + (f"-{context}" if context != "bare" else "")
        folder = Path(config.output) / name
        folder.mkdir(exist_ok=True)
        run = collect(folder, asked, backbone, [Method("plain", plain), *methods], engine, bars)
        summary = judge_run(folder, run, scorers, [LMJudge(backbone, own=True)], bars).summary
        group = next(group for group in summary["groups"] if group["kind"] == "class")
        runs.append(
            {
                "temperature": temperature,
                "top_p": top_p,
                "context": f"behind {context} tokens" if isinstance(context, int) else context,
                "prompts": group["prompts"],
                "prompt_class": group["name"],
                "judges": [scorer.name for scorer in scorers],
                "methods": {
                    name: {"variant": variant, "alpha": alpha, "figures": group["methods"][name]}
                    for name, variant, alpha in [
                        ("plain", None, 0.0),
                        *((m.name, one.name, alpha) for m, (one, alpha) in zip(methods, pairs, strict=True)),
                    ]
                },
            }
        )
    return runs


def _contexts(config: AblationConfig) -> list[Literal["bare", "chat"] | int]:
    """What stands before the prompts: nothing, the chat template, so many tokens of passages, which they go on from."""
    return ["bare", "chat", *dict.fromkeys(config.passage_tokens)] if config.what == "placement" else ["bare"]


def _method(config: AblationConfig, backbone: Backbone, one: Trained, alpha: float, plain: DecodingParams) -> Method:
    rule = config.rule
    method = Ingredients(backbone, plain, plain).steered(one.name or rule, rule, alpha, streams=one.streams)
    if one.weights is None:
        return method
    tuning = one.weights.tuning
    assert tuning != "prompt"
    return TwoModels(
        method.name, method.params, tuning=tuning, folder=one.weights.folder, weights_sha256=one.facts["sha256"]
    )


def _pulls(
    config: AblationConfig,
    backbone: Backbone,
    trained: Sequence[Trained],
    heldout: Sequence[str],
    passages: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    bars: Progress,
) -> dict[str, Any]:
    """KL(p_gen‖p_detox) along the held-out rows, and the gap of pairs, behind contexts, of each variant."""
    found = {}
    with bars.stage("behind contexts", len(trained)) as stage:
        for one in trained:
            stage.say(one.name)
            with DetoxiGen(backbone, one.streams, config=_engine(config)) as model:
                found[one.name] = asdict(
                    context_kl(
                        model,
                        heldout,
                        passages,
                        pairs=pairs,
                        passage_tokens=config.passage_tokens,
                        reply_tokens=config.reply_tokens,
                        seed=config.seed,
                    )
                )
            stage.tick()
    return found


def _engine(config: AblationConfig) -> EngineConfig:
    """Packing would replace the linear layers, which training needs; in batches as large as these it wins little."""
    return EngineConfig(max_rows=config.batch_rows, pack_weights=config.what == "sampling")
