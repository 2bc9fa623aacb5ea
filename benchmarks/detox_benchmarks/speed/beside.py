"""`detox-guard bench`, and beside it transformers' own `generate`, plain and with a guidance scale.

`generate` runs in a process of its own, as in a program that does nothing else: two OpenMP teams in one process slow
each other down. Knows clocks; knows no quality.
"""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from detox_benchmarks.speed.random_models import PREFIX, random_backbone
from detox_guard.evaluation.bench import PROMPT, RATIOS, Timed, all_of, run_bench
from detox_guard.models.load import load_backbone

if TYPE_CHECKING:
    from detox_guard.evaluation.bench import BenchReport, Ways
    from detox_guard.models.backbone import Backbone

__all__ = ["generate", "run_speed", "start_plain"]

BESIDE = {
    "plain generate / steered": ("plain generate", "engine, steered", 1.0, False),
    "guidance_scale / steered": ("generate, guidance_scale", "engine, steered", 1.6, False),
}


def run_speed(*, model: str | None = None, **fields: Any) -> BenchReport:
    """`run_bench` with two ways more; its `fields`. `model` "random-llama:135m", ":1b" or ":8b" has random weights of
    that shape, to time a GPU without a hub, and a random detoxifier. Raises as `run_bench`."""
    device, dtype = fields.get("device"), fields.get("dtype")
    if _random(model):
        fields = {"detoxifier": "random", **fields}
    with ProcessPoolExecutor(1, get_context("spawn"), start_plain, (model, device, dtype)) as plain:

        def beside(tokens: int) -> Ways:
            return {
                "plain generate": lambda: plain.submit(generate, tokens).result(),
                "generate, guidance_scale": lambda: plain.submit(partial(generate, guidance=True), tokens).result(),
            }

        loaded = _load(model, device, dtype) if _random(model) else model
        return run_bench(model=loaded, beside=beside, ratios={**RATIOS, **BESIDE}, **fields)


def _random(model: str | None) -> bool:
    return model is not None and model.startswith(PREFIX)


def _load(model: str | None, device: str | None, dtype: str | None) -> Backbone:
    if model is not None and _random(model):
        return random_backbone(model, device=device, dtype=dtype)
    return load_backbone(model, device=device, dtype=dtype)


_plain: Backbone
"""The backbone of the process that times `generate`; unset elsewhere."""


def start_plain(model: str | None, device: str | None, dtype: str | None) -> None:
    """Load what `generate` times in this process."""
    global _plain
    _plain = _load(model, device, dtype)


def generate(tokens: int, *, guidance: bool = False) -> Timed:
    """One reply by transformers' own loop, after `start_plain`."""
    import torch

    backbone = _plain
    ids = torch.tensor([backbone.tokenizer(PROMPT)["input_ids"]], device=backbone.device)
    extra: dict[str, Any] = {}
    if guidance:
        negative = torch.tensor(
            [backbone.tokenizer("A rude and toxic text: " + PROMPT)["input_ids"]], device=ids.device
        )
        extra = {"guidance_scale": 1.5, "negative_prompt_ids": negative}
    model: Any = backbone.model
    started = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=backbone.pad_token_id,
            **extra,
        )
    if backbone.device.type == "cuda":
        torch.cuda.synchronize(backbone.device)
    wall_s = time.perf_counter() - started
    return Timed(wall_s, all_of(out.shape[1] - ids.shape[1], tokens))
