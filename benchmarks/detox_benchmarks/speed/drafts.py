"""What drafts gain: questions about a passage (XQuAD), each answered with them and without. Knows clocks; knows no
quality.

Two engines, each in a process of its own, answer question by question in turn, so that a ratio compares neighbours.
What is timed is decoding, from the first text of an answer to its end, a token; and the whole answer with its prompt.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from detox_benchmarks.utility.run import QUESTION
from detox_guard._strict import StrictModel
from detox_guard.detoxifiers.resolve import as_streams
from detox_guard.detoxigen import DetoxiGen
from detox_guard.errors import DataError
from detox_guard.evaluation.bench import random_detoxifier
from detox_guard.evaluation.machine import machine, versions
from detox_guard.evaluation.prompts import read_squad
from detox_guard.models.load import load_backbone
from detox_guard.settings import DecodingParams, EngineConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["DraftsConfig", "run_drafts"]

_SHORTEST = 4
"""Tokens of an answer whose decoding is timed: what is shorter is over before it begins."""


class DraftsConfig(StrictModel):
    """What `run_drafts` times. Raises `InvalidParamsError`."""

    xquad: str
    """Questions in SQuAD's format, .json."""
    questions: Annotated[int, Field(ge=1)] = 50
    """How many of the file's."""
    drafts: Annotated[int, Field(ge=1)] = 3
    """The most tokens of a draft, as in `EngineConfig`."""
    max_new_tokens: Annotated[int, Field(ge=_SHORTEST)] = 48
    """Longest answer."""
    temperature: Annotated[float, Field(ge=0)] = 0.3
    """Of all answers."""
    alpha: Annotated[float, Field(ge=0)] = 3.0
    """Strength of the contrast; 0 is the plain model."""
    model: str | None = None
    """Hub id, folder or .gguf file; else the embedded default model."""
    detoxifier: str | None = None
    """Folder or hub id; else the shipped one. "random" is one of random numbers."""
    device: str | None = None
    """cpu, cuda, cuda:N, mps; else the best there is."""
    dtype: str | None = None
    """Number type of the weights; else what the device does best."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the choice of questions and of the answers."""


class _Answer(NamedTuple):
    text: str
    tokens: int
    later: int
    """Tokens behind those of the first piece of text,"""
    later_s: float
    """and the time from that piece to the end."""
    whole_s: float

    @property
    def per_token(self) -> float:
        return self.later_s / self.later


def run_drafts(config: DraftsConfig) -> str:
    """One line of JSON: ratios of the times without drafts to those with them, and how much was drafted and accepted.

    Raises `DataError`, and what loading and decoding raise.
    """
    prompts = _prompts(config)
    with ExitStack() as stack:
        without, drafting = (stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for _ in range(2))
        for pool, drafts in ((without, 0), (drafting, config.drafts)):
            about = pool.submit(_start, config, drafts).result()
        pairs = []
        for number, prompt in enumerate([prompts[0], *prompts]):
            # In turn, for what comes second finds the caches warm. The first pair is not counted.
            first, second = (without, drafting) if number % 2 else (drafting, without)
            one, other = first.submit(_answer, prompt).result(), second.submit(_answer, prompt).result()
            pairs.append((one, other) if first is without else (other, one))
            if not number:
                before = drafting.submit(_drafted).result()
        after = drafting.submit(_drafted).result()
    drafted, accepted = after[0] - before[0], after[1] - before[1]
    about |= {"load": os.getloadavg(), "versions": versions()}
    found = {**_ratios(pairs[1:]), "drafted": drafted, "accepted": accepted}
    return json.dumps({**found, "settings": config.model_dump(mode="json"), "about": about}, default=str)


def _prompts(config: DraftsConfig) -> list[str]:
    found = [
        QUESTION.format(context=paragraph["context"], question=one["question"])
        for paragraph in read_squad(Path(config.xquad))
        for one in paragraph.get("qas", ())
    ]
    if not found:
        raise DataError(f"{config.xquad}: no question in it")
    return [found[i] for i in np.random.default_rng(config.seed).permutation(len(found))[: config.questions]]


_MODEL: DetoxiGen
_PARAMS: DecodingParams
"""Of a process of its own: two engines in one would have two teams of threads, which slow each other down."""


def _start(config: DraftsConfig, drafts: int) -> dict[str, Any]:
    """Load what this process times; what it is."""
    global _MODEL, _PARAMS
    backbone = load_backbone(config.model, device=config.device, dtype=config.dtype)
    detoxifier: Any = random_detoxifier(backbone) if config.detoxifier == "random" else config.detoxifier
    # No prompt is kept: the first one, which is asked twice, is computed twice.
    bounds = EngineConfig(drafts=drafts, prompt_cache_slots=0)
    _MODEL = DetoxiGen(backbone, as_streams(detoxifier, backbone), config=bounds)
    _PARAMS = DecodingParams(
        alpha=config.alpha, temperature=config.temperature, max_new_tokens=config.max_new_tokens, seed=config.seed
    )
    return {"machine": machine(backbone.device), **backbone.identity}


def _drafted() -> tuple[int, int]:
    stats = _MODEL.stats()
    return stats.tokens_drafted, stats.tokens_accepted


def _answer(prompt: str) -> _Answer:
    begun = time.perf_counter()
    chunks = []
    for chunk in _MODEL.stream([{"role": "user", "content": prompt}], _PARAMS):
        chunks.append((chunk, time.perf_counter()))
    (first, first_s), (last, ended) = chunks[0], chunks[-1]
    assert last.generation is not None
    assert last.generation.trace is not None
    ends = accumulate(len(token.text) for token in last.generation.trace.tokens)
    later = sum(end > len(first.text) for end in ends)
    return _Answer(last.generation.text, last.generation.usage.completion_tokens, later, ended - first_s, ended - begun)


def _ratios(pairs: Sequence[tuple[_Answer, _Answer]]) -> dict[str, Any]:
    timed = [pair for pair in pairs if all(answer.later >= _SHORTEST for answer in pair)]
    if not timed:
        raise DataError(f"no answer is longer than {_SHORTEST} tokens", hint="ask more questions")
    decoding = [without.per_token / drafting.per_token for without, drafting in timed]
    whole = [(without.whole_s / without.tokens) / (drafting.whole_s / drafting.tokens) for without, drafting in timed]
    sums = [sum(pair[side].later_s for pair in timed) / sum(pair[side].later for pair in timed) for side in (0, 1)]
    return {
        "decoding, without / with": round(statistics.median(decoding), 3),
        "decoding, of the sums": round(sums[0] / sums[1], 3),
        "whole answer, without / with": round(statistics.median(whole), 3),
        "ms a token": [round(1e3 * one, 2) for one in sums],
        "answers timed": len(timed),
        "answers alike": sum(without.text == drafting.text for without, drafting in pairs),
        "tokens": sum(drafting.tokens for _, drafting in pairs),
    }
