"""`run_eval`: methods side by side on a prompt file, resumable. Brings prompts, samples and judges together.

The protocol is RealToxicityPrompts' (Gehman et al. 2020): several sampled continuations a prompt, judged without their
prompt; perplexity of the continuations given the prompt, under the plain backbone and any other causal model.

A run is a folder (`store`), with `summary.json` at the end. Samples are decoded once; judges can score them again.
"""

from __future__ import annotations

import json
import math
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detox_guard._files import read_json, write_whole
from detox_guard._progress import Progress
from detox_guard.errors import InvalidParamsError, ScorerError
from detox_guard.evaluation.config import EvalConfig
from detox_guard.evaluation.lms import LMJudge
from detox_guard.evaluation.machine import machine, versions
from detox_guard.evaluation.methods import METHODS, Ingredients, make_methods, needs_streams
from detox_guard.evaluation.prompts import choose_prompts, passage_of, read_passages, read_prompts
from detox_guard.evaluation.samples import Job, decode, seed_of
from detox_guard.evaluation.store import (
    KEY,
    RUN_FILE,
    SAMPLES_FILE,
    SCORE_KEY,
    SCORES_FILE,
    Journal,
    all_methods,
    load_run,
    open_run,
    stored_replies,
)
from detox_guard.evaluation.summary import summarize
from detox_guard.evaluation.tables import SUMMARY_FILE, EvalReport
from detox_guard.scorers.base import ToxicityScorer, checked_scores, load_scorer
from detox_guard.settings import DecodingParams, EngineConfig

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from detox_guard.detoxigen import DetoxiGen
    from detox_guard.evaluation.methods import Method, Recipe
    from detox_guard.evaluation.prompts import Asked
    from detox_guard.models.backbone import Backbone

__all__ = ["CONTEXTS", "collect", "judge_run", "prompt_of", "rescore", "run_eval"]

CONTEXTS = 4
JUDGES_TOO = ("device", "dtype", "trust_remote_code", "token", "cache_dir", "local_files_only")
"""How the model is loaded that other language models, which judge, are loaded alike."""
_ALSO_LOADED = ("attn_implementation", "model_kwargs", "n_ctx")
"""Ways of loading that change what comes out, and that `Backbone.identity` does not tell."""


def run_eval(*, table: Mapping[str, Recipe] = METHODS, progress: bool = True, **fields: Any) -> EvalReport:
    """Measure the plain model and each of `methods` on up to `limit` prompts of each class; `fields` are those of
    `EvalConfig`, of which `prompts` must be given.

    Every method draws `samples` continuations a prompt with the same seeds. The same call takes up a run in `output`
    that was cut off, or adds methods and judges to a finished one. `progress` shows bars on stderr where that is a
    terminal. Files and judges are checked before the model is loaded. `table` has the methods by name.
    Raises `DataError`, `ScorerError`, `InvalidParamsError`, and what loading and decoding raise.
    """
    config = EvalConfig(**fields)
    if config.prompts is None:
        raise InvalidParamsError("prompts", None, "a file or a hub data set")
    steered = needs_streams(config.methods, table)
    texts = read_passages(Path(config.passages)) if config.passages is not None else []
    read = read_prompts(config.prompts, field=config.field, words=config.words)
    chosen = choose_prompts(read, config.limit, config.seed)
    sampling = {name: getattr(config, name) for name in ("temperature", "top_p", "max_new_tokens")}
    default = DecodingParams(**sampling)
    plain = default.replace(alpha=0.0, plausibility=0.0)
    scorers, others = _judges(config.judges), _lm_judges(config)
    with ExitStack() as stack:
        folder = Path(config.output or stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(open_run(folder))
        from detox_guard.detoxifiers.resolve import as_streams
        from detox_guard.models.load import load_backbone

        backbone = load_backbone(config.model, **config.loading)
        streams = as_streams(config.detoxifier, backbone) if steered and config.detoxifier != () else ()
        made = make_methods(config.methods, config.alphas, Ingredients(backbone, plain, default, streams), table)
        bars = stack.enter_context(Progress(progress))
        asked: dict[str, Any] = {
            "source": {
                "name": Path(config.prompts).name,
                "field": config.field,
                "words": config.words,
                "chat": config.chat or bool(texts),
                "limit": config.limit,
            },
            "samples": config.samples,
            "seed": config.seed,
            "sampling": sampling,
            "passages": [passage_of(backbone, texts, config.passage_tokens, way) for way in range(CONTEXTS) if texts],
            "prompts": [asdict(prompt) for prompt in chosen],
        }
        if loading := {name: value for name, value in config.told().items() if name in _ALSO_LOADED}:
            asked["loading"] = loading
        run = collect(folder, asked, backbone, made, EngineConfig(max_rows=config.batch_rows), bars)
        return judge_run(folder, run, scorers, [LMJudge(backbone, own=True), *others], bars)


def rescore(folder: Path, *, progress: bool = True, **fields: Any) -> EvalReport:
    """Judge the stored samples of a whole run by more `judges` and `lm_judges` (loaded as the fields `JUDGES_TOO` say),
    and summarise it anew; decodes nothing.

    Raises `DataError` for a folder that holds no whole run, `InvalidParamsError` for other fields, and what loading
    judges raises.
    """
    if other := set(fields) - {"judges", "lm_judges", *JUDGES_TOO}:
        bound = f"only judges, lm_judges, {', '.join(JUDGES_TOO)}"
        raise InvalidParamsError("rescore", ", ".join(sorted(other)), bound)
    load_run(folder)  # before the judges
    config = EvalConfig(**fields)
    scorers = [load_scorer(spec) for spec in fields.get("judges", ())]
    with ExitStack() as stack:
        stack.enter_context(open_run(folder))
        bars = stack.enter_context(Progress(progress))
        return judge_run(folder, load_run(folder), scorers, _lm_judges(config), bars)


def collect(
    folder: Path,
    asked: dict[str, Any],
    backbone: Backbone,
    methods: Sequence[Method],
    config: EngineConfig,
    bars: Progress,
    model: DetoxiGen | None = None,
) -> dict[str, Any]:
    """Decode what the folder lacks of `asked` under `methods`; returns the run's settings, all its methods included.

    Each method has an engine of its own, one after the other, so that its time can be told; with a `model` all of them
    go through that one's batch together, prompt by prompt.
    Raises `DataError` where the folder holds a run of other prompts, sampling, model or meaning of a method.
    """
    identity = {**asked, **backbone.identity}
    setting = {"batch_rows": config.max_rows, "machine": machine(backbone.device), "versions": versions()}
    known = all_methods(folder / RUN_FILE, identity, methods, setting)
    run = {**identity, "methods": known, **setting}
    jobs = [_jobs(run, method) for method in methods]
    with Journal(folder / SAMPLES_FILE, KEY) as journal:
        missing = sum(job.key not in journal for many in jobs for job in many)
        if missing:
            (folder / SUMMARY_FILE).unlink(missing_ok=True)  # it is no longer of this run
        elif (folder / RUN_FILE).is_file():  # nothing is decoded now: what was said of it stays
            before = read_json(folder / RUN_FILE)
            run.update({name: before[name] for name in setting if name in before})
        write_whole(folder / RUN_FILE, json.dumps(run, ensure_ascii=False) + "\n")
        total = sum(map(len, jobs))
        with bars.stage("decoding", total, total - missing) as stage:
            if model is not None:
                decode(model, [job for row in zip(*jobs, strict=True) for job in row], journal, stage.tick)
            for method, many in zip(methods, jobs, strict=True):
                if all(job.key in journal for job in many):
                    continue
                stage.say(method.name)
                method.decode_all(backbone, config, many, journal, stage.tick)
    return run


def judge_run(
    folder: Path, run: dict[str, Any], scorers: Sequence[ToxicityScorer], lms: Sequence[LMJudge], bars: Progress
) -> EvalReport:
    """Score what has no score yet by each judge, then summarise by all that judged the whole run.

    A judge whose `fingerprint` is not that of the scores under its name judges those replies anew.
    Raises `InvalidParamsError` for two judges of one name.
    """
    judges: list[Any] = [*scorers, *lms]
    names = [judge.name for judge in judges]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InvalidParamsError("judges", twice[0], "each name once: figures go by it")
    replies = stored_replies(folder, run)
    with Journal(folder / SCORES_FILE, SCORE_KEY) as scores:
        # Judges of former calls go on with methods that came later, if they are asked again; else they are left out.
        marks = {judge.name: _mark(judge) for judge in judges}
        todo = [(judge, *at) for judge in judges for at in replies if not _has_judged(judge, marks, scores, at)]
        total = len(judges) * len(replies)
        with bars.stage("judging", total, total - len(todo)) as stage:
            for judge, method, i in todo:
                stage.say(judge.name)
                texts = [row["text"] for row in replies[method, i]]
                if isinstance(judge, LMJudge):
                    ids = [row["token_ids"] for row in replies[method, i]]
                    found = _likelihoods(judge, prompt_of(run, i), texts, ids)
                else:
                    found = {"scores": checked_scores(judge, texts)}
                scores.add({"judge": judge.name, "method": method, "prompt": i, **found, **marks[judge.name]})
                stage.tick()
        summary = summarize(run, replies, scores.rows)
    write_whole(folder / SUMMARY_FILE, json.dumps(summary, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
    return EvalReport(summary)


def prompt_of(run: dict[str, Any], i: int) -> Asked:
    """Prompt `i` as it is asked; passages take turns."""
    text: str = run["prompts"][i]["text"]
    if run["passages"]:
        text = f"{run['passages'][i % len(run['passages'])]}\n\n{text}"
    return [{"role": "user", "content": text}] if run["source"]["chat"] else text


def _jobs(run: dict[str, Any], method: Method) -> list[Job]:
    seed, samples = run["seed"], run["samples"]
    return [
        Job(method, i, prompt_of(run, i), j, seed_of(seed, i, j, samples))
        for i in range(len(run["prompts"]))
        for j in range(samples)
    ]


def _mark(judge: Any) -> dict[str, str]:
    """What its rows have of a judge that has a fingerprint, which some compute from all their weights."""
    known = getattr(judge, "fingerprint", None)
    return {} if known is None else {"fingerprint": known}


def _has_judged(judge: Any, marks: dict[str, dict[str, str]], scores: Journal, at: tuple[str, int]) -> bool:
    row = scores.rows.get((judge.name, *at))
    return row is not None and ("fingerprint" not in row or row["fingerprint"] == marks[judge.name].get("fingerprint"))


def _likelihoods(judge: LMJudge, prompt: Asked, texts: list[str], ids: list[list[int]]) -> dict[str, Any]:
    pairs = judge.judge(prompt, texts, ids)
    if not all(math.isfinite(nats) for nats, _ in pairs):
        raise ScorerError(f"{judge.name} gave a likelihood that is not a number", hint="try dtype='float32'")
    return {"nll": [round(nats, 4) for nats, _ in pairs], "tokens": [tokens for _, tokens in pairs]}


def _judges(specs: Sequence[str | ToxicityScorer]) -> list[ToxicityScorer]:
    scorers = [load_scorer(spec) for spec in specs]
    # A judge goes wrong first, not after an hour of decoding.
    for scorer in scorers:
        checked_scores(scorer, ["A first look."])
    return scorers


def _lm_judges(config: EvalConfig) -> list[LMJudge]:
    from detox_guard.models.load import load_backbone

    loading = {name: value for name, value in config.loading.items() if name in JUDGES_TOO}
    return [LMJudge(load_backbone(name, **loading)) for name in config.lm_judges]
