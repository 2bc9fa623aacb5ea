"""One run of prompt tuning with PEFT and transformers' Trainer. Knows runs and checkpoints.

Knows no formats of data (`rows`), no layouts of tokens (`examples`), no loss (`objective`), no card (`card`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
import transformers
from torch.utils.data import SequentialSampler
from transformers.trainer_callback import ProgressCallback

from detox_guard._files import hold_folder, prepare_folder
from detox_guard.detoxifiers.soft_prompt import Detoxifier
from detox_guard.errors import DetoxGuardError, InvalidParamsError
from detox_guard.models.options import LoadOptions
from detox_guard.training.card import make_card
from detox_guard.training.config import FILES
from detox_guard.training.examples import Steps, make_examples
from detox_guard.training.objective import heldout_aim, heldout_loss, step_loss
from detox_guard.training.rows import read_rows

if TYPE_CHECKING:
    from detox_guard.models.backbone import Backbone
    from detox_guard.training.config import TrainingConfig
    from detox_guard.training.examples import Step
    from detox_guard.training.rows import Rows

__all__ = ["CHECKPOINTS", "Progress", "seconds_a_step", "train_detoxifier"]

Progress = Callable[[int, int, float], None]
CHECKPOINTS = "checkpoints"
WHOLE = "whole"  # the file that marks a checkpoint as written to its end


def train_detoxifier(
    config: TrainingConfig, *, backbone: Backbone | None = None, progress: Progress | None = None
) -> Detoxifier:
    """Train a soft prompt, save it as a detoxifier folder in `config.output`, and return it.

    The backbone is frozen: only the [virtual_tokens, hidden] soft prompt learns, by AdamW on the cross-entropy of the
    toxic replies. The same config and data give the same tensor, on the same machine, cut off and resumed or not.
    `backbone`: one that is loaded already, in the place of `config.model`. `progress(step, steps, loss)` is called
    after every step, loss in nats a token; without it there is the Trainer's own bar on stderr.
    Besides the detoxifier, `loss_curve.png` is written. Raises `DataError`, also while another process trains into the
    same folder, `BackboneError`, `InvalidParamsError`.
    """
    if config.pairs and config.batch_size < 2:
        raise InvalidParamsError("batch_size", config.batch_size, "at least 2 with pairs, which are half of a batch")
    output = Path(config.output)
    if (output / "config.json").exists():
        raise InvalidParamsError("output", config.output, "a folder that holds no model")
    prepare_folder(output)
    with hold_folder(output / CHECKPOINTS, "training into it"):
        detoxifier = _train(config, read_rows(config), backbone or _load(config), progress)
        shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    return detoxifier


def seconds_a_step(config: TrainingConfig) -> float:
    """How long a step of such a run takes here: the second of two of the split kind, most of what is trained on."""
    rows, backbone = read_rows(config), _load(config)
    examples = make_examples(config, backbone, rows.contexts)
    steps = Steps(examples, rows.texts, rows.anchors, rows.pairs, config.replace(mixture=(0.0, 1.0, 0.0, 0.0)))
    soft_prompt = torch.zeros(config.virtual_tokens, backbone.hidden_size, device=backbone.device, requires_grad=True)
    for step in range(2):
        begun_s = time.perf_counter()
        loss = step_loss(backbone.model, soft_prompt, steps[step], config)
        torch.autograd.grad(loss, soft_prompt)[0].cpu()  # which waits for a GPU
        took_s = time.perf_counter() - begun_s
    return took_s


def _train(config: TrainingConfig, rows: Rows, backbone: Backbone, progress: Progress | None) -> Detoxifier:
    from detox_guard.training.loss_curve import draw_loss_curve

    if backbone.device.type == "cuda" and backbone.device.index:  # the Trainer would move the model to the first
        bound = "'cuda' for training; choose the device with CUDA_VISIBLE_DEVICES"
        raise InvalidParamsError("device", str(backbone.device), bound)
    examples = make_examples(config, backbone, rows.contexts)
    start = None if config.start is None else Detoxifier.load(config.start)
    if start is not None:
        _check_start(start, config, backbone)
    model = _soft_prompted(backbone, config, start)
    base, soft_prompt = model.get_base_model(), _soft_prompt(model)
    model.eval()  # dropout in a frozen backbone is only noise, and serving has none
    before = heldout_loss(base, soft_prompt, examples, rows.heldout, config)

    run = _run_folder(config, backbone, rows, start)
    if not config.resume:
        shutil.rmtree(run, ignore_errors=True)
    steps = Steps(examples, rows.texts, rows.anchors, rows.pairs, config)
    trainer = _trainer(model, steps, config, run, backbone, progress)
    trainer.train(resume_from_checkpoint=_last_whole(run) if config.resume else None)

    model.eval()
    after = heldout_loss(base, soft_prompt, examples, rows.heldout, config)
    aim = heldout_aim(base, soft_prompt, examples, rows.heldout_pairs, config) if rows.heldout_pairs else {}
    card = make_card(config, backbone, rows.sources, start, before=before, after=after, aim=aim)
    detoxifier = Detoxifier(soft_prompt.detach().float().cpu().clone(), card)
    draw_loss_curve(trainer.state.log_history, Path(config.output) / "loss_curve.png")
    detoxifier.save(config.output)
    return detoxifier


def _load(config: TrainingConfig) -> Backbone:
    from detox_guard.models.load import load_backbone

    return load_backbone(config.model, **config.loading)


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


class _SoftPromptTrainer(transformers.Trainer):  # type: ignore[misc]
    """transformers' Trainer with our loss; one item of the data set is one batch."""

    def __init__(self, config: TrainingConfig, **kwargs: Any) -> None:
        self.config = config
        super().__init__(**kwargs)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        model.eval()  # the Trainer has set it to train; see `_train`
        return step_loss(model.get_base_model(), _soft_prompt(model), inputs, self.config)

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


def _only(items: Sequence[Step]) -> Step:
    (step,) = items
    return step


def _run_folder(config: TrainingConfig, backbone: Backbone, rows: Rows, start: Detoxifier | None) -> Path:
    """Where this run's checkpoints are: named by all that the result depends on, so that no other run's mix in."""
    left_out = {"output", "start", "resume", "notes", "licence", "checkpoint_steps", *FILES, *LoadOptions.model_fields}
    settings = config.model_dump(exclude=left_out) | config.told()
    roles = [len(getattr(config, name) or ()) for name in FILES]
    texts = [source.sha256 for source in rows.sources]
    facts = [settings, backbone.id, backbone.revision, roles, texts, start and start.sha256]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return Path(config.output) / CHECKPOINTS / digest[:12]


def _last_whole(run: Path) -> str | None:
    whole = sorted(run.glob(f"checkpoint-*/{WHOLE}"), key=lambda mark: int(mark.parent.name.rpartition("-")[2]))
    return str(whole[-1].parent) if whole else None
