"""Detoxifiers that are another set of weights, LoRA (Hu et al. 2021) and full fine-tuning: beside prompt tuning.

Knows training, saving, and what a detoxifier costs in bytes; knows no decoding. Batches, schedule and clipping are
those of prompt tuning (`detox_guard.training`), so that two detoxifiers differ in what was trained and not in how.
"""

from __future__ import annotations

import copy
import hashlib
import random
import re
import warnings
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from detox_guard.errors import DetoxGuardError, UnsupportedBackboneError
from detox_guard.models.load import load_backbone
from detox_guard.steering.forced import generator_logits, reply_loss
from detox_guard.training.examples import KINDS, to_device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from detox_guard.models.backbone import Backbone
    from detox_guard.training.examples import Batch, Examples

__all__ = ["WeightTuning", "bytes_of", "heldout_loss", "load_weights", "scored", "train_weights", "weights_logits"]

WeightTuning = Literal["lora", "full"]
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_PEFT_ASKS = "`is_gradient_checkpointing` is deprecated"
_FILES = {"lora": "adapter_model.safetensors", "full": "model.safetensors"}


class TrainedWeights(NamedTuple):
    """What was trained: the whole model, how many of its parameters learned, and the SHA-256 of the file of those."""

    model: Any
    parameters: int
    sha256: str


def train_weights(
    tuning: WeightTuning,
    backbone: Backbone,
    batches: Callable[[int], Batch],
    *,
    steps: int,
    learning_rate: float,
    rank: int,
    seed: int,
    folder: Path,
    progress: Callable[[int, int, float], None],
) -> TrainedWeights:
    """Train a float32 copy of the backbone, and save what was trained in `folder`.

    "lora" trains adapters of this `rank` on the attention's projections, "full" every weight, by AdamW with prompt
    tuning's cosine schedule on the replies of `batches(step)`. The backbone is not touched. `progress(step, steps,
    loss)` is called after every step. Raises `DetoxGuardError` for a loss that is no number, and
    `UnsupportedBackboneError` where there is no attention layer to adapt.
    """
    from transformers import get_cosine_schedule_with_warmup

    copied: Any = copy.deepcopy(backbone.model).float()
    wrapped = _with_adapters(copied, rank, seed) if tuning == "lora" else copied.requires_grad_(True)
    model = wrapped.get_base_model() if tuning == "lora" else copied
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 10), steps)
    model.eval()  # as in prompt tuning: the dropout of a model that serves without one is only noise
    for step in range(1, steps + 1):
        batch = to_device(batches(step - 1), backbone.device)
        counted = scored(batch)
        loss = reply_loss(weights_logits(model, batch), counted)
        if counted["reply_mask"].any():  # else a single word that nothing stands before: no token to learn from
            if not bool(loss.isfinite()):
                raise DetoxGuardError(f"step {step}: the loss is {loss.item()}", hint="a lower learning rate")
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress(step, steps, loss.item())
    parameters = sum(parameter.numel() for parameter in trained)
    wrapped.requires_grad_(False)
    wrapped.save_pretrained(folder)
    digest = hashlib.sha256((folder / _FILES[tuning]).read_bytes()).hexdigest()
    return TrainedWeights(model, parameters, digest)


def load_weights(tuning: WeightTuning, folder: Path, backbone: Backbone) -> Any:
    """The model that `train_weights` left in `folder`, in the backbone's dtype and place.

    LoRA's adapters are merged into a copy of the backbone, whose `nn.Linear` layers must still be there (an engine that
    packs weights replaces them). Who serves LoRA would keep one set of weights and its adapters beside it.
    """
    import peft

    if tuning == "full":
        return load_backbone(folder, tokenizer=backbone.tokenizer, device=backbone.device, dtype=backbone.dtype).model
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_PEFT_ASKS)
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(backbone.model), folder)
    return adapted.merge_and_unload().eval().requires_grad_(False)


def weights_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Logits [rows, reply_len, vocab] that predict `batch["reply_ids"]`, differentiable in all weights.

    Behind an empty context nothing predicts the first token, and its logits are zeros: `scored` leaves it out. A
    context that all rows share is computed once, its graph included.
    """
    logits = generator_logits(model, batch)
    return functional.pad(logits, (0, 0, batch["reply_ids"].shape[1] - logits.shape[1], 0))


def scored(batch: Batch) -> Batch:
    """The batch for `reply_loss` (not for the model, whose attention reads the mask too): `reply_mask` is 0 also on
    first tokens behind an empty context, which only a soft prompt can predict, so that every detoxifier's loss is over
    the same tokens."""
    mask = batch["reply_mask"].clone()
    mask[:, 0] *= batch["context_mask"].any(dim=1).to(mask.dtype)
    return {**batch, "reply_mask": mask}


@torch.no_grad()
def heldout_loss(
    logits_of: Callable[[Batch], torch.Tensor],
    examples: Examples,
    texts: Sequence[str],
    *,
    rows: int,
    seed: int,
    device: torch.device,
) -> float:
    """Nats a `scored` reply token: the plain mean over the kinds of examples; alike for the same texts and seed."""
    losses = []
    for kind in KINDS:
        rng = random.Random(f"{seed}/heldout/{kind}")
        nats = tokens = 0.0
        for first in range(0, len(texts), rows):
            batch = to_device(examples.batch(kind, texts[first : first + rows], rng), device)
            counted = scored(batch)
            count = int(counted["reply_mask"].sum())
            if count:
                nats += float(reply_loss(logits_of(batch), counted)) * count
                tokens += count
        losses.append(nats / max(tokens, 1))
    return round(sum(losses) / len(losses), 4)


def bytes_of(parameters: int, dtype: torch.dtype) -> dict[str, int]:
    """What so many trained parameters cost beside the frozen backbone, activations aside.

    "training": float32 weights, their gradients, and AdamW's two moments. "serving": the weights in the backbone's
    dtype; LoRA's as adapters beside one set of weights, not merged into a second.
    """
    return {"training": 4 * 4 * parameters, "serving": dtype.itemsize * parameters}


def _with_adapters(model: Any, rank: int, seed: int) -> Any:
    """The model inside PEFT with trainable LoRA adapters on its attention's projections, which start as no change."""
    import peft
    from transformers.pytorch_utils import Conv1D

    names = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and _ATTENTION.search(name)
    ]
    if not names:
        raise UnsupportedBackboneError(f"{type(model).__name__} has no linear layer that is called attention")
    transposed = isinstance(model.get_submodule(names[0]), Conv1D)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_PEFT_ASKS)
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(
            model,
            peft.LoraConfig(
                task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=names, fan_in_fan_out=transposed
            ),
        )
    # with a base named here, PEFT would ask the hub for it when the adapters are saved
    wrapped.peft_config["default"].base_model_name_or_path = ""
    return wrapped
