"""From a model to a detoxifier for it: rows, a first tuning, the model's own replies, a second one, figures, a card.

Knows the phases and what each of them leaves behind. How to tune is `training`'s, how to measure is `evaluation`'s.

What a phase makes lies in `work` in the output folder, each written whole: `toxic.jsonl`, `harmless.jsonl`,
`heldout.jsonl` and `sources.json` (rows), `plan.json`, `first` (a detoxifier), `replies.jsonl`, `pairs.jsonl`, `second`
(a detoxifier), `evaluation` (a run). A run that was cut off goes on at the first of them that is not there.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detox_guard._files import hold_folder, prepare_folder, read_json, write_whole
from detox_guard.errors import DataError, InvalidParamsError
from detox_guard.models.checks import CONFIG_FILE
from detox_guard.models.options import LoadOptions
from detox_guard.training.plan import FEWEST_STEPS, FULL_STEPS, Plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from detox_guard._progress import Progress
    from detox_guard.detoxifiers.card import DataSource
    from detox_guard.detoxifiers.registry import Entry
    from detox_guard.detoxifiers.soft_prompt import Detoxifier
    from detox_guard.evaluation.tables import EvalReport
    from detox_guard.models.backbone import Backbone
    from detox_guard.training.config import AdaptConfig, TrainingConfig
    from detox_guard.training.data import Text
    from detox_guard.training.own_pairs import Draw

__all__ = ["WORK", "Adapted", "adapt"]

WORK = "work"
ROWS, HELDOUT = 2500, 48
"""Toxic rows, and as many harmless ones, that are learned from and that are held out; at most."""
PROMPTS_A_BATCH, SAMPLES, TOKENS = 16, 6, 18
"""Prompts decoded together, and how many replies of how many tokens are drawn to each, in each way."""
DRAWN: tuple[Draw, ...] = ("plain", "lean")
"""Steered away from a first detoxifier that knows little yet, replies are much like the plain ones."""
FEWEST_PAIRS = 10
MEASURED_SAMPLES = 8


@dataclass(frozen=True)
class Adapted:
    """What came of it: where the detoxifier lies, and how it was measured. `pushed`: its address on the hub."""

    folder: Path
    detoxifier: Detoxifier
    report: EvalReport
    entry: Entry
    pushed: str | None = None


def adapt(config: AdaptConfig, *, say: Callable[[str], object] = lambda words: None, bars: bool = True) -> Adapted:
    """Make a detoxifier for `config.model` in `config.folder`, and register it for the next `from_pretrained`.

    The same call takes up a run that was cut off, and comes to the same soft prompt. `say` hears of each phase;
    `bars` shows progress with the time left on stderr where that is a terminal.
    Raises `DataError` (rows that cannot be had, a folder that holds another run, or that another process works in),
    `InvalidParamsError`, `BackboneError`, `ScorerError`, and what decoding raises.
    """
    from detox_guard.detoxifiers.soft_prompt import Detoxifier
    from detox_guard.training.hub import push

    if (config.data is None) != (config.anchors is None):
        raise InvalidParamsError("anchors", config.anchors, "data and anchors, or neither of them")
    folder = config.folder
    if (folder / "config.json").exists():
        raise InvalidParamsError("output", str(folder), "a folder that holds no model")
    prepare_folder(folder)
    with hold_folder(folder / WORK, "adapting a model in it"):
        run = _Run(config, folder / WORK, say, bars)
        run.check()
        sources = run.rows()
        plan = run.plan()
        first = run.tune("first", plan)
        pairs = run.pairs(plan, first)
        second = run.tune("second", plan, start=first, pairs=pairs)
        report = run.measure(plan, second)
        entry = run.finish(second, sources, report)
    pushed = None if config.push_to_hub is None else push(folder, config.push_to_hub)
    return Adapted(folder, Detoxifier.load(folder), report, entry, pushed)


@dataclass(frozen=True)
class _Run:
    """One run in its folder. Each method is a phase: it does what is not there yet, and gives what is."""

    config: AdaptConfig
    work: Path
    say: Callable[[str], object]
    bars: bool

    def check(self) -> None:
        """Raise for what would go wrong after hours, and where the folder holds a run that was asked for otherwise."""
        from detox_guard.scorers.base import checked_scores, load_scorer

        for scorer in map(load_scorer, (self.config.scorer, *self.config.judges)):
            checked_scores(scorer, ["A first look."])
        left_out = {"output", "licence", "push_to_hub", *LoadOptions.model_fields}
        asked = self.config.model_dump(mode="json", exclude=left_out) | self.config.told()
        files = [*(self.config.data or ()), *(self.config.anchors or ()), *filter(None, [self.config.prompts])]
        asked["files"] = [_sha256(Path(name).read_bytes()) for name in files if Path(name).is_file()]
        path = self.work / "asked.json"
        known = read_json(path) if (self.work / "sources.json").exists() else asked
        if other := [name for name in {**asked, **known} if known.get(name) != asked.get(name)]:
            raise DataError(
                f"{self.work.parent}: holds a run with another {other[0]}",
                hint=f"name another folder with --output, or remove {self.work}",
            )
        write_whole(path, json.dumps(asked, ensure_ascii=False) + "\n")

    def rows(self) -> list[DataSource]:
        """Rows to learn from and beginnings of others to measure on; where they come from."""
        from detox_guard.detoxifiers.card import DataSource
        from detox_guard.training.rows import beginning, set_apart, to_json

        path = self.work / "sources.json"
        if not path.exists():
            toxic, harmless, sources = self._read() if self.config.data else self._fetch()
            heldout: list[dict[str, Any]] = []
            for name, texts in (("toxic", toxic), ("harmless", harmless)):
                learned, held = set_apart(name, texts, ROWS, HELDOUT, self.config.seed)
                self._write(f"{name}.jsonl", map(to_json, learned))
                heldout += [{"prompt": beginning(text), "toxicity": float(name == "toxic")} for text in held]
            self._write("heldout.jsonl", heldout)
            write_whole(path, json.dumps([source.model_dump() for source in sources]) + "\n")
        return [DataSource(**source) for source in read_json(path)]

    def plan(self) -> Plan:
        """How much is done: by `steps`, else as much as `minutes` are thought to allow."""
        path = self.work / "plan.json"
        if not path.exists():
            plan = Plan.of(self.config.steps) if self.config.steps is not None else self._affordable()
            write_whole(path, json.dumps(asdict(plan)) + "\n")
        return Plan(**read_json(path))

    def tune(self, name: str, plan: Plan, start: Path | None = None, pairs: Path | None = None) -> Path:
        """The folder of a soft prompt: "first" on the toxic rows, "second" from there, with `pairs` and anchors."""
        from detox_guard.training import train_detoxifier

        training = self._training(name, getattr(plan, name), start, pairs)
        if not (self.work / name / CONFIG_FILE).exists():
            self._tell(f"{name} tuning, {training.steps} steps", plan, name)
            with self._bars() as bars, bars.stage(f"{name} tuning", training.steps) as stage:

                def step(done: int, steps: int, loss: float) -> None:
                    stage.say(f"loss {loss:.3f}")
                    stage.at(done)

                train_detoxifier(training, progress=step)
        return self.work / name

    def pairs(self, plan: Plan, first: Path) -> Path | None:
        """The file of the model's own pairs; None where too few were found."""
        from detox_guard.scorers.base import checked_scores, load_scorer
        from detox_guard.training.own_pairs import Drawn, choose_pairs

        path = self.work / "pairs.jsonl"
        if not path.exists():
            self._tell(f"its own replies to {plan.prompts} prompts", plan, "pairs")
            scorer = load_scorer(self.config.scorer)
            rows: list[dict[str, str]] = []
            replies = self._replies(plan, first)
            for chat in (False, True):
                drawn = [Drawn(*reply) for row in replies if row["chat"] == chat for reply in row["replies"]]
                rows += choose_pairs(drawn, lambda texts: checked_scores(scorer, list(texts)), chat=chat)
            self._write(path.name, rows)
            self.say(f"{len(rows)} pairs" + ("" if len(rows) >= FEWEST_PAIRS else ": too few, so it learns without"))
        return path if _lines(path) >= FEWEST_PAIRS else None

    def measure(self, plan: Plan, second: Path) -> EvalReport:
        """How toxic its replies to held-out prompts are, plain and steered as it serves."""
        from detox_guard.evaluation import EvalReport, run_eval
        from detox_guard.evaluation.tables import SUMMARY_FILE

        folder = self.work / "evaluation"
        if (folder / SUMMARY_FILE).exists():
            return EvalReport.load(folder)
        self._tell("measuring before and after", plan, "measure")
        return run_eval(
            prompts=self.config.prompts or self.work / "heldout.jsonl",
            model=self.config.model,
            detoxifier=str(second),
            judges=self.config.judges,
            samples=MEASURED_SAMPLES,
            limit=plan.measured,
            seed=self.config.seed,
            output=folder,
            progress=self.bars,
            **self._loading(),
        )

    def finish(self, second: Path, sources: Sequence[DataSource], report: EvalReport) -> Entry:
        """Put card, README and soft prompt into the output folder, and register them, unless that was done."""
        from detox_guard.detoxifiers import registry
        from detox_guard.detoxifiers.soft_prompt import Detoxifier
        from detox_guard.training.card import adapted_card, readme

        made, folder, config = Detoxifier.load(second), self.work.parent, self.config
        if not (folder / CONFIG_FILE).exists():
            first = Detoxifier.load(self.work / "first")
            Detoxifier(made.embeddings, adapted_card(made.card, first.card, sources, config)).save(folder)
        card = Detoxifier.load(folder).card
        where = config.push_to_hub or folder.name
        write_whole(folder / "README.md", readme(card, config.model, where, report.markdown()))
        known = [entry for entry in registry.entries() if entry.sha256 == made.sha256]
        return known[0] if known else registry.register(folder, self._load())

    def _tell(self, words: str, plan: Plan, phase: str) -> None:
        minutes = plan.minutes_from(phase)
        self.say(words if minutes is None else f"{words}; about {max(1, round(minutes))} minutes left in all")

    def _bars(self) -> Progress:
        from detox_guard._progress import Progress

        return Progress(self.bars)

    def _loading(self) -> dict[str, Any]:
        """How it is loaded. Training on a CPU is faster in float32, also where bfloat16 decodes faster."""
        from detox_guard.models.backbone import pick_device

        config = self.config
        ours = config.dtype is None and config.quantization_config is None and not config.spreads
        if ours and pick_device(config.one_device).type == "cpu":
            return {**config.loading, "dtype": "float32"}
        return config.loading

    def _load(self) -> Backbone:
        from detox_guard.models.load import load_backbone

        return load_backbone(self.config.model, **self._loading())

    def _write(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        write_whole(self.work / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def _read(self) -> tuple[list[Text], list[Text], list[DataSource]]:
        from detox_guard.training.data import read_texts

        config = self.config
        data, anchors = (
            [read_texts(source, field=config.text_field, licence=config.licence) for source in sources or ()]
            for sources in (config.data, config.anchors)
        )
        toxic, harmless = ([text for rows in many for text in rows.texts] for many in (data, anchors))
        return toxic, harmless, [rows.source for rows in (*data, *anchors)]

    def _fetch(self) -> tuple[list[Text], list[Text], list[DataSource]]:
        from detox_guard.detoxifiers.card import DataSource
        from detox_guard.training.hub import COMMENTS, LICENCE, fetch_comments

        self.say(f"rows of {COMMENTS}")
        count = ROWS + HELDOUT
        with self._bars() as bars, bars.stage("rows", 2 * count) as stage:
            toxic, harmless = fetch_comments(count, stage.at)
        digest = _sha256("\n".join([*toxic, *harmless]).encode())
        return [*toxic], [*harmless], [DataSource(name=COMMENTS, sha256=digest, rows=2 * count, licence=LICENCE)]

    def _training(self, name: str, steps: int, start: Path | None, pairs: Path | None) -> TrainingConfig:
        """Settings of a tuning: many replies behind their prompts, as they are served. See the shipped card."""
        from detox_guard.training import TrainingConfig

        config = self.config
        harmless, fewest = (
            self.work / "harmless.jsonl",
            min(map(_lines, [self.work / "toxic.jsonl", *([pairs] if pairs else [])])),
        )
        more: dict[str, Any] = {"batch_size": 8}
        if name == "second":
            more = {"start": start, "anchors": harmless, "anchor_weight": 0.3, "pairs": pairs, "pair_weight": 10.0}
        return TrainingConfig(
            data=(str(self.work / "toxic.jsonl"),),
            output=str(self.work / name),
            model=config.model,
            contexts=(str(harmless),),
            virtual_tokens=config.virtual_tokens,
            steps=steps,
            reply_tokens=20,
            passage_tokens=(100, 300),
            mixture=(0.1, 0.5, 0.3, 0.1),
            heldout=max(1, min(24, fewest // 5)),
            seed=config.seed,
            checkpoint_steps=10,
            **self._loading(),
            **more,
        )

    def _affordable(self) -> Plan:
        from detox_guard.training.trainer import seconds_a_step

        self.say("timing a step")
        step_s = seconds_a_step(self._training("second", 2, None, None))
        full = Plan.of(FULL_STEPS, step_s).minutes_from("first") or 0.0
        steps = int(FULL_STEPS * min(1.0, self.config.minutes / full))
        plan = Plan.of(max(FEWEST_STEPS, steps), step_s)
        if steps < FEWEST_STEPS:
            self.say(f"{self.config.minutes:g} minutes are too few here for a plan; the smallest is followed")
        return plan

    def _replies(self, plan: Plan, first: Path) -> list[dict[str, Any]]:
        """Rows of replies, in an order of their own: `draw`, `at`, `chat` and `replies` as `Drawn`."""
        from detox_guard.detoxifiers.soft_prompt import Detoxifier
        from detox_guard.evaluation.store import Journal
        from detox_guard.training.data import read_texts
        from detox_guard.training.own_pairs import open_for, sample
        from detox_guard.training.rows import beginning

        toxic, harmless = (
            [beginning(text) for text in read_texts(str(self.work / name)).texts]
            for name in ("toxic.jsonl", "harmless.jsonl")
        )
        most = plan.prompts * 2 // 3
        prompts = [*toxic[:most], *harmless[: plan.prompts - most]]
        random.Random(self.config.seed).shuffle(prompts)
        starts = range(0, len(prompts), PROMPTS_A_BATCH)
        with Journal(self.work / "replies.jsonl", ("draw", "at")) as journal, self._bars() as bars:
            missing = [(draw, at) for draw in DRAWN for at in starts if (draw, at) not in journal]
            total = len(DRAWN) * len(starts)
            with bars.stage("its own replies", total, total - len(missing)) as stage:
                backbone = self._load() if missing else None
                for draw in DRAWN:
                    own = [at for of, at in missing if of == draw]
                    if not own or backbone is None:
                        continue
                    with open_for(draw, backbone, Detoxifier.load(first)) as model:
                        for at in own:
                            # a third of the prompts are user turns
                            chat = backbone.has_chat_template and at // PROMPTS_A_BATCH % 3 == 2
                            some = prompts[at : at + PROMPTS_A_BATCH]
                            seed = self.config.seed + at * SAMPLES
                            replies = sample(
                                model, some, draw=draw, samples=SAMPLES, tokens=TOKENS, seed=seed, chat=chat
                            )
                            journal.add({"draw": draw, "at": at, "chat": chat, "replies": replies})
                            stage.tick()
            return [journal.rows[draw, at] for draw in DRAWN for at in starts]


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
