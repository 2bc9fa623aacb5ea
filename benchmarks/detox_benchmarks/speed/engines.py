"""The same model on each engine and number type, and in other programs, in one run: what a step costs where.

Each way of serving has a process of its own, as a user's would be; only one of them works at a time. Knows clocks;
knows no quality.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator

from detox_benchmarks.speed import beside
from detox_guard import DetoxiGen, EngineConfig
from detox_guard.detoxifiers.resolve import as_streams
from detox_guard.errors import InvalidParamsError
from detox_guard.evaluation.bench import PROMPT, Timed, Ways, all_of, figures, random_detoxifier, ways_of
from detox_guard.evaluation.config import BenchConfig
from detox_guard.evaluation.machine import machine, peak_memory_mib, versions
from detox_guard.models.default import default_gguf
from detox_guard.models.load import load_backbone

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ENGINES", "EngineBenchConfig", "run_engines"]

ENGINES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int4": {"dtype": "bfloat16", "quantization_config": "int4"},
    "llamacpp": {"engine": "llamacpp"},
}
"""Of ours, by what `from_pretrained` is told."""
GENERATE, GUIDED, LLAMA = "generate", "guidance_scale", "llama-cpp-python"
"""Of others: transformers' own loop in bfloat16, plain and with a guidance scale; llama-cpp-python's plain one."""


class EngineBenchConfig(BenchConfig):
    """What `run_engines` times. Raises `InvalidParamsError`."""

    engines: tuple[str, ...] = (*ENGINES, GENERATE, GUIDED, LLAMA)
    """Which; else all of them."""
    gguf: str | None = None
    """File of the same model for llama.cpp; else the embedded default's."""
    drafts: Annotated[int, Field(ge=0, le=64)] = EngineConfig().drafts
    """The most tokens of a draft; 0 is off, so that texts which repeat themselves take no less time."""

    @field_validator("engines", mode="before")
    @classmethod
    def _many(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value


def run_engines(**fields: Any) -> str:
    """One line of JSON: the figures of each way on each engine, and of each the median of its ratios to the plain
    `generate` of its round (time a token; to the first token for long contexts). Raises as `run_bench`, and
    `InvalidParamsError`."""
    config = EngineBenchConfig(**fields).sized()
    known = (*ENGINES, GENERATE, GUIDED, LLAMA)
    for name in config.engines:
        if name not in known:
            raise InvalidParamsError("engines", name, f"some of {', '.join(known)}")
    with ExitStack() as stack:
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for name in config.engines}
        ways = {name: pool.submit(_start, name, config.model_dump()).result() for name, pool in pools.items()}
        for name, pool in pools.items():
            for way in ways[name]:
                pool.submit(_time, way).result()
        rounds: list[dict[str, Timed]] = []
        for _ in range(config.runs):
            rounds.append(
                {
                    f"{name}: {way}": pool.submit(_time, way).result()
                    for name, pool in pools.items()
                    for way in ways[name]
                }
            )
        peak = {name: pool.submit(_peak).result() for name, pool in pools.items()}
    timings = {way: figures([found[way] for found in rounds]) for way in rounds[0]}
    if base := next((way for way in timings if way.startswith(f"{GENERATE}:")), None):
        for way, found in timings.items():
            found["over_generate"] = round(
                statistics.median(one[way].per_token / one[base].per_token for one in rounds), 3
            )
    import torch

    about = {
        "machine": machine(torch.device("cpu")),
        "load": [round(one, 1) for one in os.getloadavg()],
        "versions": versions(),
        "peak_mib": peak,
        **config.model_dump(mode="json", include={"tokens", "context", "streams", "runs", "model", "gguf", "drafts"}),
    }
    return json.dumps({"timings": timings, "about": about})


_WAYS: Ways = {}
"""Of the process that serves one engine; empty elsewhere."""


def _start(name: str, fields: dict[str, Any]) -> list[str]:
    """Load what this process serves; the names of its ways."""
    config = EngineBenchConfig(**fields)
    if name in (GENERATE, GUIDED):
        beside.start_plain(config.model, device=config.device, dtype="bfloat16")
        _WAYS["plain"] = lambda: beside.generate(config.tokens, guidance=name == GUIDED)
    elif name == LLAMA:
        _WAYS["plain"] = _llama_loop(config.gguf or str(default_gguf(progress=False)), config.tokens)
    else:
        loading = ENGINES[name]
        source = config.gguf if "engine" in loading and config.gguf else config.model
        backbone = load_backbone(source, **loading)
        detoxifier = random_detoxifier(backbone) if config.detoxifier == "random" else config.detoxifier
        model = DetoxiGen(backbone, as_streams(detoxifier, backbone), config=EngineConfig(drafts=config.drafts))
        _WAYS.update(ways_of(model, config.tokens, config.context, config.streams))
    return list(_WAYS)


def _llama_loop(file: str, tokens: int) -> Callable[[], Timed]:
    """The loop that llama-cpp-python brings, greedy."""
    import llama_cpp

    llama: Any = llama_cpp.Llama(model_path=file, n_ctx=2048, verbose=False, logits_all=False)

    def loop() -> Timed:
        llama.reset()
        begun, first, count = time.perf_counter(), float("nan"), 0
        for _ in llama.generate(llama.tokenize(PROMPT.encode()), temp=0.0):
            count += 1
            if count == 1:
                first = time.perf_counter() - begun
            if count == tokens:
                break
        return Timed(time.perf_counter() - begun, all_of(count, tokens), first)

    return loop


def _time(way: str) -> Timed:
    return _WAYS[way]()


def _peak() -> float | None:
    import torch

    return peak_memory_mib(torch.device("cpu"))
