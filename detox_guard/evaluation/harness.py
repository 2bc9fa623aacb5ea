"""`run_eval`: methods side by side on a prompt file, resumable. Brings prompts, samples and judges together.

The protocol is RealToxicityPrompts' (Gehman et al. 2020): several sampled continuations a prompt, judged without their
prompt; perplexity of the continuations given the prompt, under the plain backbone and any other causal model.

A run is a folder: `run.json` (what was asked), `samples.jsonl` and `scores.jsonl` (journals named `.part` until they
are whole), and at the end `summary.json`. Samples are decoded once; they can be scored again, by other judges.
"""

from __future__ import annotations

import json
import math
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detox_guard._files import hold_folder, read_json, write_whole
from detox_guard.errors import DataError, InvalidParamsError, ScorerError
from detox_guard.evaluation.journal import Journal
from detox_guard.evaluation.judges import load_judge
from detox_guard.evaluation.likelihood import BackboneJudge, OtherModelJudge
from detox_guard.evaluation.machine import machine, versions
from detox_guard.evaluation.methods import Ingredients, check_names, make_methods, read_words
from detox_guard.evaluation.progress import Progress
from detox_guard.evaluation.prompts import choose_prompts, passage_of, read_passages, read_prompts
from detox_guard.evaluation.results import SUMMARY_FILE, EvalReport
from detox_guard.evaluation.samples import KEY, Job, decode, seed_of
from detox_guard.evaluation.summary import summarize
from detox_guard.scorers.base import ToxicityScorer, checked_scores
from detox_guard.settings import DecodingParams, EngineConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from detox_guard.detoxigen import DetoxiGen, ManySteering
    from detox_guard.evaluation.likelihood import ReplyJudge
    from detox_guard.evaluation.methods import Method
    from detox_guard.evaluation.prompts import Asked
    from detox_guard.models.backbone import Backbone

__all__ = [
    "RUN_FILE",
    "SAMPLES_FILE",
    "SCORES_FILE",
    "collect",
    "judge_run",
    "load_run",
    "open_run",
    "prompt_of",
    "rescore",
    "run_eval",
    "stored_replies",
    "stored_scores",
]

RUN_FILE, SAMPLES_FILE, SCORES_FILE = "run.json", "samples.jsonl", "scores.jsonl"
CONTEXTS = 4
SCORE_KEY = ("judge", "method", "prompt")
UNSTEERED = {"plain", "polite", "banned-words", "resample", "toxic-prefix"}


def run_eval(
    *,
    prompts: str | Path,
    field: str | None = None,
    words: int | None = None,
    chat: bool = False,
    passages: Path | None = None,
    passage_tokens: int = 600,
    model: str | Path | None = None,
    revision: str | None = None,
    detoxifier: ManySteering = None,
    expert: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    methods: Sequence[str] = ("default",),
    alphas: Sequence[float] = (2.0,),
    plausibility: float = 0.02,
    banned_words: Path | None = None,
    judges: Sequence[str | ToxicityScorer] = ("embedded",),
    lm_judges: Sequence[str] = (),
    samples: int = 25,
    max_new_tokens: int = 20,
    temperature: float = 1.0,
    top_p: float = 0.9,
    limit: int = 100,
    seed: int = 0,
    batch_rows: int = 64,
    output: Path | None = None,
    progress: bool = True,
) -> EvalReport:
    """Measure the plain model and each of `methods` (`methods.METHODS`) on up to `limit` prompts of each class.

    `prompts`, `field`, `words`: as in `read_prompts`; `chat` asks them as a user's turn; with `passages` that turn
    begins with about `passage_tokens` tokens of neutral text of that file (`read_passages`), as in retrieval.
    `alphas`: for every method whose strength is free; `plausibility` is the floor of those with one; `expert` and
    `banned_words` are files that one method each needs. `lm_judges` name causal models for perplexity, besides the
    backbone. Every method draws `samples` continuations a prompt with the same seeds. `output`: the folder of the run;
    the same call takes up one that was cut off, or adds methods and judges to a finished one. `progress` shows bars on
    stderr where that is a terminal. Files and judges are checked before the model is loaded.
    Raises `DataError`, `ScorerError`, `InvalidParamsError`, and what loading and decoding raise.
    """
    for name, count, least in (("samples", samples, 1), ("batch_rows", batch_rows, 2), ("seed", seed, 0)):
        if count < least:
            raise InvalidParamsError(name, count, f"at least {least}")
    names = check_names(methods)
    texts = read_passages(passages) if passages is not None else []
    if passage_tokens < 1:
        raise InvalidParamsError("passage_tokens", passage_tokens, "at least 1")
    chosen = choose_prompts(read_prompts(prompts, field=field, words=words), limit, seed)
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
    default = DecodingParams(**sampling)
    plain = default.replace(alpha=0.0, plausibility=0.0)
    banned = read_words(banned_words) if banned_words is not None else ()
    scorers, others = _judges(judges), _lm_judges(lm_judges, device, dtype)
    with ExitStack() as stack:
        folder = output or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(open_run(folder))
        from detox_guard.detoxifiers.soft_prompt import Detoxifier, as_streams
        from detox_guard.models.load import load_backbone

        backbone = load_backbone(model, device=device, dtype=dtype, revision=revision)
        streams = () if set(names) <= UNSTEERED or detoxifier == () else as_streams(detoxifier, backbone)
        second = Detoxifier.load(expert) if expert is not None else None
        if second is not None:
            second.validate(backbone)
        ingredients = Ingredients(backbone, plain, default, streams, second, float(plausibility), banned)
        made = make_methods(names, alphas, ingredients)
        bars = stack.enter_context(Progress(progress))
        asked: dict[str, Any] = {
            "source": {
                "name": Path(prompts).name,
                "field": field,
                "words": words,
                "chat": chat or bool(texts),
                "limit": limit,
            },
            "samples": samples,
            "seed": seed,
            "sampling": sampling,
            "passages": [passage_of(backbone, texts, passage_tokens, way) for way in range(CONTEXTS) if texts],
            "prompts": [asdict(prompt) for prompt in chosen],
        }
        run = collect(folder, asked, backbone, made, EngineConfig(max_rows=batch_rows), bars)
        return judge_run(folder, run, scorers, [BackboneJudge(backbone), *others], bars)


def rescore(
    folder: Path,
    *,
    judges: Sequence[str | ToxicityScorer] = (),
    lm_judges: Sequence[str] = (),
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> EvalReport:
    """Judge the stored samples of a whole run by more judges, and summarise it anew; decodes nothing.

    Raises `DataError` for a folder that holds no whole run, and what loading judges raises.
    """
    load_run(folder)  # before the judges
    scorers = [load_judge(spec) for spec in judges]
    with ExitStack() as stack:
        stack.enter_context(open_run(folder))
        bars = stack.enter_context(Progress(progress))
        return judge_run(folder, load_run(folder), scorers, _lm_judges(lm_judges, device, dtype), bars)


def load_run(folder: Path) -> dict[str, Any]:
    """What `run.json` holds: what was asked, and of which methods. Raises `DataError` unless all samples are there."""
    if not (folder / RUN_FILE).is_file() or not (folder / SAMPLES_FILE).is_file():
        raise DataError(f"{folder}: no whole run in it", hint="give the command that made it again, to finish it")
    run: dict[str, Any] = read_json(folder / RUN_FILE)
    return run


@contextmanager
def open_run(folder: Path) -> Iterator[None]:
    """Hold a run's folder, made unless it is there. Raises `DataError` while another process holds it."""
    with hold_folder(folder, "measuring into it"):
        yield


def collect(
    folder: Path,
    asked: dict[str, Any],
    backbone: Backbone,
    methods: Sequence[Method],
    config: EngineConfig,
    bars: Progress,
    guard: DetoxiGen | None = None,
) -> dict[str, Any]:
    """Decode what the folder lacks of `asked` under `methods`; returns the run's settings, all its methods included.

    Each method has an engine of its own, one after the other, so that its time can be told; with a `guard` all of them
    go through that one's batch together, prompt by prompt.
    Raises `DataError` where the folder holds a run of other prompts, sampling, model or meaning of a method.
    """
    identity = {**asked, **backbone.identity}
    known = all_methods(folder / RUN_FILE, identity, methods)
    setting = {"batch_rows": config.max_rows, "machine": machine(backbone.device), "versions": versions()}
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
            if guard is not None:
                decode(guard, [job for row in zip(*jobs, strict=True) for job in row], journal, stage.tick)
            for method, many in zip(methods, jobs, strict=True):
                if all(job.key in journal for job in many):
                    continue
                stage.say(method.name)
                method.decode_all(backbone, config, many, journal, stage.tick)
        if len(journal.rows) == len(known) * len(asked["prompts"]) * asked["samples"]:
            journal.finish()
    return run


def all_methods(path: Path, identity: dict[str, Any], methods: Sequence[Method]) -> dict[str, Any]:
    """What each method is, by name: of `methods`, and of those of a run that is there already. Raises `DataError` if it
    is another run, or means something else by a name."""
    known: dict[str, Any] = {}
    if path.exists():
        old = read_json(path)
        for name, value in json.loads(json.dumps(identity)).items():
            if old.get(name) != value:
                hint = "take another folder, or remove it"
                raise DataError(f"{path.parent}: holds a run of another {name}", hint=hint)
        known = old["methods"]
    for method in methods:
        mine = json.loads(json.dumps(method.identity()))
        if known.setdefault(method.name, mine) != mine:
            raise DataError(
                f"{path.parent}: holds another {method.name!r}", hint="take another folder for other settings"
            )
    return known


def _jobs(run: dict[str, Any], method: Method) -> list[Job]:
    seed, samples = run["seed"], run["samples"]
    return [
        Job(method, i, prompt_of(run, i), j, seed_of(seed, i, j, samples))
        for i in range(len(run["prompts"]))
        for j in range(samples)
    ]


def prompt_of(run: dict[str, Any], i: int) -> Asked:
    """Prompt `i` as it is asked; passages take turns."""
    text: str = run["prompts"][i]["text"]
    if run["passages"]:
        text = f"{run['passages'][i % len(run['passages'])]}\n\n{text}"
    return [{"role": "user", "content": text}] if run["source"]["chat"] else text


def judge_run(
    folder: Path,
    run: dict[str, Any],
    scorers: Sequence[ToxicityScorer],
    lms: Sequence[ReplyJudge],
    bars: Progress,
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
                if isinstance(judge, ToxicityScorer):
                    found: dict[str, Any] = {"scores": checked_scores(judge, texts)}
                else:
                    ids = [row["token_ids"] for row in replies[method, i]]
                    found = _likelihoods(judge, prompt_of(run, i), texts, ids)
                scores.add({"judge": judge.name, "method": method, "prompt": i, **found, **marks[judge.name]})
                stage.tick()
        scores.finish()
        summary = summarize(run, replies, scores.rows)
    write_whole(folder / SUMMARY_FILE, json.dumps(summary, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
    return EvalReport(summary)


def _mark(judge: Any) -> dict[str, str]:
    """What its rows have of a judge that has a fingerprint, which some compute from all their weights."""
    known = getattr(judge, "fingerprint", None)
    return {} if known is None else {"fingerprint": known}


def _has_judged(judge: Any, marks: dict[str, dict[str, str]], scores: Journal, at: tuple[str, int]) -> bool:
    row = scores.rows.get((judge.name, *at))
    return row is not None and ("fingerprint" not in row or row["fingerprint"] == marks[judge.name].get("fingerprint"))


def stored_scores(folder: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Rows of `scores.jsonl` by judge, method and prompt: `scores` of a judge of toxicity, `nll` and `tokens` of a
    language model."""
    return Journal(folder / SCORES_FILE, SCORE_KEY).rows


def stored_replies(folder: Path, run: dict[str, Any]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """All samples of each method and prompt that has all of them."""
    rows = Journal(folder / SAMPLES_FILE, KEY).rows
    samples = range(run["samples"])
    return {
        (method, i): [rows[method, i, j] for j in samples]
        for method in run["methods"]
        for i in range(len(run["prompts"]))
        if all((method, i, j) in rows for j in samples)
    }


def _likelihoods(judge: ReplyJudge, prompt: Asked, texts: list[str], ids: list[list[int]]) -> dict[str, Any]:
    pairs = judge.judge(prompt, texts, ids)
    if not all(math.isfinite(nats) for nats, _ in pairs):
        raise ScorerError(f"{judge.name} gave a likelihood that is not a number", hint="try dtype='float32'")
    return {"nll": [round(nats, 4) for nats, _ in pairs], "tokens": [tokens for _, tokens in pairs]}


def _judges(specs: Sequence[str | ToxicityScorer]) -> list[ToxicityScorer]:
    if isinstance(specs, str) or not specs:
        raise InvalidParamsError("judges", specs, "a list of at least one scorer")
    scorers = [load_judge(spec) for spec in specs]
    # A judge goes wrong first, not after an hour of decoding.
    for scorer in scorers:
        checked_scores(scorer, ["A first look."])
    return scorers


def _lm_judges(
    names: Sequence[str], device: str | torch.device | None, dtype: str | torch.dtype | None
) -> list[ReplyJudge]:
    from detox_guard.models.load import load_backbone

    return [OtherModelJudge(load_backbone(name, device=device, dtype=dtype)) for name in names]
