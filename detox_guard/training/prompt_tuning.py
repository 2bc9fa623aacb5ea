"""Training a soft prompt on toxic text with PEFT and transformers' Trainer. Knows runs, checkpoints and cards.

Knows no formats of data (`data`), no layouts of tokens (`examples`, `forward`).
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import peft
import torch
import transformers
from torch.utils.data import Dataset, SequentialSampler
from transformers.trainer_callback import ProgressCallback

from detox_guard._files import prepare_folder
from detox_guard.detoxifiers.soft_prompt import Detoxifier, DetoxifierCard
from detox_guard.errors import DataError, DetoxGuardError, InvalidParamsError
from detox_guard.steering.forced import both_logits, contrast, pair_loss, reply_logits, reply_loss
from detox_guard.training.config import FILES
from detox_guard.training.data import Reply, Text, TextPairs, TextRows, read_pairs, read_texts, whole
from detox_guard.training.examples import KINDS, NEUTRAL_TEXTS, Batch, Examples, Kind, rows_of, to_device

if TYPE_CHECKING:
    from detox_guard.models.backbone import Backbone
    from detox_guard.training.config import TrainingConfig

__all__ = ["Progress", "Steps", "divide", "make_examples", "texts_for", "train_detoxifier"]

Row = TypeVar("Row")
_Pair = tuple[Text, Text]
Progress = Callable[[int, int, float], None]
CHECKPOINTS = "checkpoints"
WHOLE = "whole"  # the file that marks a checkpoint as written to its end
LIMITS = "Trained on explicit toxicity; implicit hate is not what it has seen."


def train_detoxifier(
    config: TrainingConfig, *, backbone: Backbone | None = None, progress: Progress | None = None
) -> Detoxifier:
    """Train a soft prompt, save it as a detoxifier folder in `config.output`, and return it.

    The backbone is frozen: only the [virtual_tokens, hidden] soft prompt learns, by AdamW on the cross-entropy of the
    toxic replies. The same config and data give the same tensor, on the same machine, cut off and resumed or not.
    `backbone`: one that is loaded already, in the place of `config.model`. `progress(step, steps, loss)` is called
    after every step, loss in nats a token; without it there is the Trainer's own bar on stderr.
    Besides the detoxifier, `loss_curve.png` is written. Raises `DataError`, `BackboneError`, `InvalidParamsError`.
    """
    from detox_guard.training.loss_curve import draw_loss_curve

    if config.pairs and config.batch_size < 2:
        raise InvalidParamsError("batch_size", config.batch_size, "at least 2 with pairs, which are half of a batch")
    folder = Path(config.output)
    if (folder / "config.json").exists():
        raise InvalidParamsError("output", config.output, "a folder that holds no model")
    prepare_folder(folder)
    data = [_read(config, source) for source in config.data]
    contexts = [_read(config, source) for source in config.contexts or ()]
    anchors = [_read(config, source) for source in config.anchors or ()]
    paired = [
        read_pairs(source, max_bad_rows=config.max_bad_rows, licence=config.licence) for source in config.pairs or ()
    ]
    if backbone is None:
        from detox_guard.models.load import load_backbone

        backbone = load_backbone(config.model, device=config.device, dtype=config.dtype, revision=config.revision)
    if backbone.device.type == "cuda" and backbone.device.index:  # the Trainer would move the model to the first
        bound = "'cuda' for training; choose the device with CUDA_VISIBLE_DEVICES"
        raise InvalidParamsError("device", str(backbone.device), bound)
    examples = make_examples(
        config, backbone, [whole(text) for rows in contexts for text in rows.texts] or NEUTRAL_TEXTS
    )
    train, heldout = divide([text for rows in data for text in rows.texts], config)
    pairs, heldout_pairs = divide([pair for rows in paired for pair in rows.pairs], config) if paired else ([], [])

    start = None if config.start is None else Detoxifier.load(config.start)
    if start is not None:
        _check_start(start, config, backbone)
    model = _soft_prompted(backbone, config, start)
    before = _heldout_loss(model, examples, heldout, config)
    sources: list[TextRows | TextPairs] = [*data, *contexts, *anchors, *paired]
    run = _run_folder(config, backbone, sources, start)
    if not config.resume:
        shutil.rmtree(run, ignore_errors=True)
    harmless = list(dict.fromkeys(text for rows in anchors for text in rows.texts))
    random.Random(config.seed).shuffle(harmless)
    trainer = _trainer(model, Steps(examples, train, harmless, pairs, config), config, run, backbone, progress)
    trainer.train(resume_from_checkpoint=_last_whole(run) if config.resume else None)
    after = _heldout_loss(model, examples, heldout, config)
    aim = _heldout_aim(model, examples, heldout_pairs, config) if heldout_pairs else {}

    output = Path(config.output)
    soft_prompt = _soft_prompt(model)
    card = DetoxifierCard(
        base_id=backbone.id,
        base_revision=backbone.revision,
        hidden_size=backbone.hidden_size,
        num_layers=backbone.num_layers,
        virtual_tokens=config.virtual_tokens,
        position=config.position,
        initial_text=config.initial_text if start is None else start.card.initial_text,
        data=tuple(dict.fromkeys(rows.source for rows in sources)),
        start_sha256=None if start is None else start.sha256,
        transformers_version=transformers.__version__,
        peft_version=peft.__version__,
        torch_version=torch.__version__,
        seed=config.seed,
        steps=config.steps,
        command=config.command(),
        heldout_loss_before=before,
        heldout_loss_after=after,
        heldout_aim=aim,
        embedding_scale=_embedding_scale(backbone),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        notes=config.notes or LIMITS,
    )
    detoxifier = Detoxifier(soft_prompt.detach().float().cpu().clone(), card)
    draw_loss_curve(trainer.state.log_history, output / "loss_curve.png")
    detoxifier.save(output)
    shutil.rmtree(run.parent, ignore_errors=True)
    return detoxifier


def _read(config: TrainingConfig, source: str) -> TextRows:
    return read_texts(source, field=config.text_field, max_bad_rows=config.max_bad_rows, licence=config.licence)


def make_examples(config: TrainingConfig, backbone: Backbone, contexts: Sequence[str]) -> Examples:
    room = None
    if backbone.max_positions is not None:
        room = backbone.max_positions - config.virtual_tokens - config.reply_tokens
        if room < 1:
            bound = f"virtual_tokens + reply_tokens must stay under the backbone's {backbone.max_positions} positions"
            raise InvalidParamsError("virtual_tokens", config.virtual_tokens, bound)
    return Examples(
        backbone,
        contexts=contexts,
        reply_len=config.reply_tokens,
        passage_len=config.passage_tokens,
        max_context_len=room,
    )


def divide(rows: Sequence[Row], config: TrainingConfig) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows, `config.heldout` or a few more. Equal rows count once, and what follows one prompt
    stays together, so that neither can be on both sides."""
    unique = list(dict.fromkeys(rows))
    random.Random(config.seed).shuffle(unique)
    together: dict[object, list[Row]] = {}
    for row in unique:
        text = row[0] if isinstance(row, tuple) and not isinstance(row, Reply) else row
        together.setdefault(text.prompt if isinstance(text, Reply) else row, []).append(row)
    train: list[Row] = []
    heldout: list[Row] = []
    for many in together.values():
        (train if len(heldout) >= config.heldout else heldout).extend(many)
    if not train:
        raise DataError(
            f"{', '.join((*config.data, *(config.pairs or ())))}: {len(unique)} different rows, of which "
            f"{config.heldout} are held out",
            hint="more data, or fewer held-out rows",
        )
    return train, heldout


def _check_start(start: Detoxifier, config: TrainingConfig, backbone: Backbone) -> None:
    """A soft prompt that cannot be gone on from is refused. Raises `DetoxifierError`, `InvalidParamsError`."""
    start.validate(backbone)
    for name in ("position", "virtual_tokens"):
        if getattr(start.card, name) != getattr(config, name):
            raise InvalidParamsError(name, getattr(config, name), f"as in `start`: {getattr(start.card, name)}")


def _soft_prompted(backbone: Backbone, config: TrainingConfig, start: Detoxifier | None) -> Any:
    """The backbone inside PEFT, its soft prompt that of `start`, else the embeddings of the initial text, tiled."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
        # PEFT wants the tokenizer by name; ours may come from a GGUF or a hub that is out of reach
        backbone.tokenizer.save_pretrained(folder)
        model = peft.get_peft_model(
            backbone.model,
            peft.PromptTuningConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=config.virtual_tokens,
                prompt_tuning_init="TEXT",
                prompt_tuning_init_text=config.initial_text,
                tokenizer_name_or_path=folder,
            ),
        )
    # with a base named here, PEFT would ask the hub for it at every checkpoint
    model.peft_config["default"].base_model_name_or_path = ""
    if start is not None:
        with torch.no_grad():
            _soft_prompt(model).copy_(start.embeddings)
    return model


def _soft_prompt(model: Any) -> torch.Tensor:
    weight: torch.Tensor = model.prompt_encoder["default"].embedding.weight
    return weight


def _embedding_scale(backbone: Backbone) -> float | None:
    scale = getattr(backbone.model.get_input_embeddings(), "embed_scale", None)
    return None if scale is None else float(scale)


class _Step(TypedDict):
    """What one training step sees: `toxic` toxic replies, then harmless ones in contexts of the same kind. The first
    `pairs` of both say the same, and which of them is preferred is learned."""

    batch: Batch
    toxic: int
    pairs: int


@dataclass(frozen=True)
class Steps(Dataset[_Step]):
    """Item i is step i; a run that is resumed meets the batches it would have met."""

    examples: Examples
    texts: Sequence[Text]
    anchors: Sequence[Text]
    pairs: Sequence[_Pair]
    config: TrainingConfig

    def __len__(self) -> int:
        return self.config.steps

    def __getitem__(self, step: int) -> _Step:
        seed = f"{self.config.seed}/{step}"
        (kind,) = random.Random(seed).choices(KINDS, weights=self.config.mixture)
        rows = _rows(kind, self.config)
        paired = rows // 2 if self.pairs else 0
        own_pairs, own_texts, own_anchors = self._by_kind[kind]
        most = self.config.batch_size // 2 if self.pairs else 0
        alone = step * (self.config.batch_size - most)  # so that none is passed over
        pairs = _next(own_pairs, step * most, paired)
        toxic = [one for one, _ in pairs]
        toxic += _next(own_texts, alone, rows - paired)
        learned = paired if self.config.pair_weight > 0 else 0
        harmless: list[Text] = []
        if learned or self.config.anchor_weight > 0:
            harmless += [other for _, other in pairs]
            if self.anchors:
                harmless += _next(own_anchors, alone, rows - paired)
        # In one batch, so in the same contexts: or the soft prompt could tell the two by their contexts.
        batch = self.examples.batch(kind, toxic + harmless, random.Random(f"{seed}/{kind}"))
        return _Step(batch=batch, toxic=len(toxic), pairs=learned)

    @cached_property
    def _by_kind(self) -> dict[Kind, tuple[Sequence[_Pair], Sequence[Text], Sequence[Text]]]:
        """Pairs, toxic texts and anchors that each kind of batch is made for."""
        return {
            kind: (_pairs_for(kind, self.pairs), texts_for(kind, self.texts), texts_for(kind, self.anchors))
            for kind in KINDS
        }


def texts_for(kind: Kind, texts: Sequence[Text]) -> Sequence[Text]:
    """Those that this kind of batch is made for: continuations behind their prompts, answers behind their questions,
    elsewhere texts by themselves. Where there are none, whatever there is, first of all what follows something."""
    return [texts[i] for i in _places_for(kind, texts)]


def _pairs_for(kind: Kind, pairs: Sequence[_Pair]) -> Sequence[_Pair]:
    """As `texts_for`."""
    return [pairs[i] for i in _places_for(kind, [toxic for toxic, _ in pairs])]


def _places_for(kind: Kind, texts: Sequence[Text]) -> Sequence[int]:
    alone = [i for i, text in enumerate(texts) if isinstance(text, str)]
    if kind in ("bare", "passage"):
        return alone or range(len(texts))
    following = [(i, text.chat) for i, text in enumerate(texts) if not isinstance(text, str)]
    own = [i for i, chat in following if chat == (kind == "chat")]
    return own or [i for i, _ in following] or alone


def _next(rows: Sequence[Row], first: int, count: int) -> list[Row]:
    """`count` rows from place `first` on, over and over again."""
    return [rows[i % len(rows)] for i in range(first, first + count)]


def _rows(kind: Kind, config: TrainingConfig) -> int:
    """In front of a passage the whole of it takes part in every row's graph: fewer rows."""
    return max(1, config.batch_size // 4) if kind == "passage" and config.position == "front" else config.batch_size


@torch.no_grad()
def _heldout_loss(model: Any, examples: Examples, texts: Sequence[Text], config: TrainingConfig) -> dict[str, float]:
    """Nats a reply token, by kind, and their plain mean."""
    model.eval()
    base, soft_prompt = model.get_base_model(), _soft_prompt(model)
    losses: dict[str, float] = {}
    for kind in KINDS:
        rng = random.Random(f"{config.seed}/heldout/{kind}")
        total = tokens = 0.0
        own = texts_for(kind, texts)
        for first in range(0, len(own), _rows(kind, config)):
            batch = examples.batch(kind, own[first : first + _rows(kind, config)], rng)
            batch = to_device(batch, soft_prompt.device)
            count = float(batch["reply_mask"].sum())
            logits = reply_logits(base, soft_prompt, batch, config.position)
            total += float(reply_loss(logits, batch)) * count
            tokens += count
        losses[kind] = round(total / tokens, 4)
    losses["mean"] = round(sum(losses.values()) / len(KINDS), 4)
    return losses


@torch.no_grad()
def _heldout_aim(model: Any, examples: Examples, pairs: Sequence[_Pair], config: TrainingConfig) -> dict[str, float]:
    """Share of the pairs whose toxic text the detoxifier favours more than the neutral one, by kind, and their mean."""
    model.eval()
    base, soft_prompt = model.get_base_model(), _soft_prompt(model)
    aim: dict[str, float] = {}
    for kind in KINDS:
        above, own = 0, _pairs_for(kind, pairs)
        for first in range(0, len(own), _rows(kind, config)):
            some = own[first : first + _rows(kind, config)]
            texts = [text for side in zip(*some, strict=True) for text in side]
            batch = examples.batch(kind, texts, random.Random(f"{config.seed}/aim/{kind}/{first}"))
            batch = to_device(batch, soft_prompt.device)
            found = contrast(*both_logits(base, soft_prompt, batch, config.position), batch)
            above += int((found.log_ratio[: len(some)] > found.log_ratio[len(some) :]).sum())
        aim[kind] = round(above / len(own), 4)
    aim["mean"] = round(sum(aim.values()) / len(KINDS), 4)
    return aim


class _SoftPromptTrainer(transformers.Trainer):  # type: ignore[misc]
    """transformers' Trainer with our loss; one item of the data set is one batch."""

    def __init__(self, config: TrainingConfig, **kwargs: Any) -> None:
        self.config = config
        super().__init__(**kwargs)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        model.eval()  # dropout in a frozen backbone is only noise, and serving has none
        soft_prompt = _soft_prompt(model)
        base, position = model.get_base_model(), self.config.position

        batch, toxic, pairs = to_device(inputs["batch"], soft_prompt.device), inputs["toxic"], inputs["pairs"]
        rude, rest = rows_of(batch, slice(toxic)), rows_of(batch, slice(toxic, None))
        if not len(rest["reply_ids"]):
            return reply_loss(reply_logits(base, soft_prompt, batch, position), batch)
        logits, generator = both_logits(base, soft_prompt, batch, position)
        harmless = contrast(logits[toxic:], generator[toxic:], rest)
        loss = reply_loss(logits[:toxic], rude) + self.config.anchor_weight * harmless.divergence
        if pairs:
            twins = contrast(logits[:pairs], generator[:pairs], rows_of(batch, slice(pairs)))
            loss = loss + self.config.pair_weight * pair_loss(twins.log_ratio, harmless.log_ratio[:pairs])
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset or self.train_dataset)


class _Bar(ProgressCallback):  # type: ignore[misc]
    """The Trainer's progress bar, with the loss in it instead of a line a step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")


class _Watch(transformers.TrainerCallback):  # type: ignore[misc]
    """Marks whole checkpoints, stops at a loss that is no number, and tells the caller about each step."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE).touch()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not float("-inf") < loss < float("inf"):
            raise DetoxGuardError(f"step {state.global_step}: the loss is {loss}", hint="a lower learning rate")
        if self.progress is not None:
            self.progress(state.global_step, state.max_steps, loss)


def _trainer(
    model: Any, steps: Steps, config: TrainingConfig, run: Path, backbone: Backbone, progress: Progress | None
) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(run),
        max_steps=config.steps,
        per_device_train_batch_size=1,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, config.steps // 10),
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=config.checkpoint_steps,
        save_total_limit=2,
        seed=config.seed,
        use_cpu=backbone.device.type == "cpu",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = 1  # a soft prompt needs no second device, and DataParallel would want one
    trainer = _SoftPromptTrainer(
        config,
        model=model,
        args=arguments,
        train_dataset=steps,
        data_collator=_only,
        callbacks=[_Watch(progress), *([] if progress else [_Bar()])],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _only(items: Sequence[_Step]) -> _Step:
    (step,) = items
    return step


def _run_folder(
    config: TrainingConfig, backbone: Backbone, data: Sequence[TextRows | TextPairs], start: Detoxifier | None
) -> Path:
    """Where this run's checkpoints are: named by all that the result depends on, so that no other run's mix in."""
    settings = config.model_dump(exclude={"output", "start", "resume", "notes", "licence", "checkpoint_steps", *FILES})
    roles = [len(getattr(config, name) or ()) for name in FILES]
    texts = [rows.source.sha256 for rows in data]
    facts = [settings, backbone.id, backbone.revision, roles, texts, start and start.sha256]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return Path(config.output) / CHECKPOINTS / digest[:12]


def _last_whole(run: Path) -> str | None:
    whole = sorted(run.glob(f"checkpoint-*/{WHOLE}"), key=lambda mark: int(mark.parent.name.rpartition("-")[2]))
    return str(whole[-1].parent) if whole else None
