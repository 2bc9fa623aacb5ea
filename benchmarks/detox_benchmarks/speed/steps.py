"""One decoding step and one prefill of a model on a CPU, its linear layers plain, packed and in 4 bits.

"own step" is the engine's step on those in 4 bits, where it has one; the others are transformers' forward.
The ways are timed in turn, round after round, and the least time of each counts. Knows clocks and layouts; knows no
scheduler, and no quality but the distance from float32.
"""

from __future__ import annotations

import copy
import json
import os
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from detox_guard.engine.torch.held import Held
from detox_guard.engine.torch.int4 import Int4Linear
from detox_guard.engine.torch.lanes import Lanes
from detox_guard.engine.torch.packing import can_pack, pack_linears
from detox_guard.engine.torch.static import static_step
from detox_guard.evaluation.machine import machine, versions
from detox_guard.models.load import load_backbone

if TYPE_CHECKING:
    from collections.abc import Callable

    from detox_guard.engine.torch.static import StaticStep

__all__ = ["run_steps"]

ROWS, CONTEXT, PROMPT = (1, 2, 4, 8, 16), 200, 600
TEXTS = [
    f"{who} {what}"
    for who in ("The mayor of the town", "My neighbour's dog", "The new film", "Our teacher", "That old computer")
    for what in ("said that nobody would ever", "is known for its", "was built in the year", "makes people think that")
]
"""What the distance is measured on."""


def run_steps(model: str | None = None, rounds: int = 30) -> str:
    """One line of JSON: milliseconds a step by rows, and of a prefill, for each layout; mean KL from float32 (nats)."""
    backbone = load_backbone(model, device="cpu", dtype="bfloat16")
    if not can_pack(backbone.model):
        raise SystemExit("this CPU packs no bfloat16")
    ways = {"plain": backbone.model, "packed": _packed(backbone.model), "int4": copy.deepcopy(backbone.model)}
    pack_linears(ways["int4"])
    with torch.inference_mode():
        found: dict[str, Any] = {}
        own = static_step(ways["int4"])
        for rows in ROWS:
            steps = {name: _step(way, rows) for name, way in ways.items()}
            if own is not None:
                steps["own step"] = _own_step(own, ways["int4"], rows)
            found[f"step of {rows} rows"] = _least(steps, rounds)
        found[f"prefill of {PROMPT}"] = _least({name: _prefill(way) for name, way in ways.items()}, max(3, rounds // 5))
        reference = load_backbone(model, device="cpu", dtype="float32")
        found["mean KL"] = {name: _distance(reference, way) for name, way in ways.items()}
    load = [round(one, 1) for one in os.getloadavg()]
    about = {"machine": machine(backbone.device), "load": load, "versions": versions(), "rounds": rounds}
    return json.dumps({"model": backbone.id, **found, "about": about})


def _packed(model: Any) -> Any:
    """A copy whose layers are packed, none in 4 bits."""
    packed = copy.deepcopy(model)
    pack_linears(packed)
    for parent in list(packed.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Int4Linear) and child.many is not None:
                setattr(parent, name, child.many)
    return packed


def _least(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    least = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            least[name] = min(least[name], 1e3 * (time.perf_counter() - begun))
    return {name: round(value, 2) for name, value in least.items()}


def _step(model: Any, rows: int) -> Callable[[], object]:
    ids, cache = torch.full((rows, CONTEXT), 100), DynamicCache()
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def step() -> None:
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.crop(-1)

    return step


def _own_step(own: StaticStep, model: Any, rows: int) -> Callable[[], object]:
    batch = Lanes(own, model.device, max(ROWS), max(ROWS) * 2 * CONTEXT)
    cache = DynamicCache()
    model(input_ids=torch.full((1, CONTEXT), 100), past_key_values=cache, use_cache=True, logits_to_keep=1)
    for _ in range(rows):
        batch.join([Held([(layer.keys, layer.values) for layer in cache.layers])], 1)

    def step() -> None:
        batch.decode([[100]] * rows)
        for row in batch.rows:
            batch.rewind(row, 1)

    return step


def _prefill(model: Any) -> Callable[[], object]:
    ids = torch.arange(100, 100 + PROMPT).unsqueeze(0)
    return lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1)


def _distance(reference: Any, model: Any) -> float:
    """Mean over the positions of the texts, each read by a few tokens a pass, as a step of a few rows computes."""
    total, count = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([reference.tokenizer(text)["input_ids"]])
        exact, cache = reference.model(input_ids=ids).logits[0].log_softmax(-1), DynamicCache()
        parts = [
            model(input_ids=part, past_key_values=cache, use_cache=True).logits[0]
            for part in torch.split(ids, 4, dim=1)
        ]
        got = torch.cat(parts).float().log_softmax(-1)
        total += float((exact.exp() * (exact - got)).sum())
        count += ids.shape[1]
    return float(f"{total / count:.2e}")
