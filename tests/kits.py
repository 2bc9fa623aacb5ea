"""Every runner that the engine's invariants are held against. A new one is a kit of its own, and its line in `KITS`."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from unittest import mock

import pytest
import torch
from harness import random_ids, random_streams
from reference import Reference
from tiny import make_tiny_backbone
from tiny_gguf import make_tiny_gguf
from toy_runner import VOCAB, ToyRunner, rows_of, toy_logits
from watched import Watched

from detox_guard.detoxifiers.base import Place, TokenPrefix
from detox_guard.engine import Scheduler
from detox_guard.engine.torch.runner import TorchRunner
from detox_guard.models.load import load_backbone
from detox_guard.settings import EngineConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.models.backbone import Backbone


class Kit(Protocol):
    """One runner and what tests need to know of it. Views are letters: `f` front, `r` reply; capitals are experts."""

    vocab_size: int

    def runner(self, views: str, config: EngineConfig) -> Any: ...

    def reference(self, views: str) -> Reference:
        """The slow way, in float64."""

    def plain(self, prompt: list[int], new: int) -> list[int]:
        """The backend's own greedy decoding."""

    def spared(self, common: int, views: str) -> int:
        """Columns that need not be computed where another prompt begins with the same tokens."""


class TorchKit:
    """Transformers on torch: a tiny Llama."""

    def __init__(self) -> None:
        self._backbone = make_tiny_backbone("llama", initializer_range=0.2)
        self.vocab_size = self._backbone.vocab_size
        self._model = make_tiny_backbone("llama", initializer_range=0.2).model  # the other one gets packed

    def runner(self, views: str, config: EngineConfig) -> TorchRunner:
        return TorchRunner(self._backbone, random_streams(self._backbone, views), config)

    def reference(self, views: str) -> Reference:
        return Reference.of(self._model, random_streams(self._backbone, views))

    def plain(self, prompt: list[int], new: int) -> list[int]:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        out = self._model.generate(ids, attention_mask=mask, max_new_tokens=new, **options)  # type: ignore[operator]
        return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]

    def spared(self, common: int, views: str) -> int:
        return common


class ToyReference(Reference):
    def logits(self, prompt: list[int], reply: list[int], contexts: Sequence[list[int]]) -> list[torch.Tensor]:
        rows = rows_of(self.streams, prompt, contexts)  # type: ignore[arg-type]
        return [torch.stack([toy_logits([*row, *reply[:i]]).double() for i in range(len(reply))]) for row in rows]


class ToyKit:
    """No model at all."""

    vocab_size = VOCAB

    def views(self, kinds: str) -> list[TokenPrefix]:
        places: dict[str, Place] = {"f": "front", "r": "reply"}
        return [
            TokenPrefix(tuple(range(20 + i, 25 + 2 * i)), 1.0 if kind.isupper() else -1.0, places[kind.lower()])
            for i, kind in enumerate(kinds)
        ]

    def runner(self, views: str, config: EngineConfig) -> ToyRunner:
        return ToyRunner(self.views(views))

    def reference(self, views: str) -> Reference:
        return ToyReference(torch.nn.Identity(), self.views(views))  # type: ignore[arg-type]

    def plain(self, prompt: list[int], new: int) -> list[int]:
        read = list(prompt)
        for _ in range(new):
            read.append(int(toy_logits(read).argmax()))
        return read[len(prompt) :]

    def spared(self, common: int, views: str) -> int:
        return common


EXACT = {"engine": "llamacpp", "type_k": "f32", "type_v": "f32", "flash_attn": False, "n_threads": 1}
"""llama.cpp as it computes like torch in float32."""
NO_LLAMACPP = "the extra `llamacpp` is not installed: make test-llamacpp"
has_llamacpp = importlib.util.find_spec("llama_cpp") is not None


@cache
def _tiny_gguf() -> tuple[Backbone, torch.nn.Module, Any]:
    folder = tempfile.TemporaryDirectory()
    file = Path(folder.name) / "tiny.gguf"
    model = make_tiny_gguf(file, initializer_range=0.2)
    with mock.patch.dict(os.environ, DETOX_GUARD_CACHE=folder.name):
        return load_backbone(file, **EXACT), model, folder


class LlamaKit(TorchKit):
    """llama.cpp: the same tiny Llama as a GGUF file in F32, its cache in F32 too."""

    def __init__(self) -> None:
        self._backbone, self._model, _ = _tiny_gguf()
        self.vocab_size = self._backbone.vocab_size

    def runner(self, views: str, config: EngineConfig) -> Any:
        from detox_guard.engine.llamacpp.runner import LlamaRunner

        return LlamaRunner(self._backbone, random_streams(self._backbone, views), config)

    def spared(self, common: int, views: str) -> int:
        """Whole blocks, in each row that reads the prompt."""
        return common // 64 * 64 * (1 + views.lower().count("f"))


KITS: dict[str, type[Kit]] = {"torch": TorchKit, "toy": ToyKit, "llamacpp": LlamaKit}


def kit_of(name: str) -> Kit:
    """Skips the test where the runner's library is not installed."""
    if name == "llamacpp" and not has_llamacpp:
        pytest.skip(NO_LLAMACPP)
    return KITS[name]()


def engine_of(kit: Kit, views: str = "", **bounds: Any) -> Scheduler:
    return watched_engine(kit, views, **bounds)[0]


def watched_engine(kit: Kit, views: str = "", **bounds: Any) -> tuple[Scheduler, Watched]:
    config = EngineConfig(**bounds)
    runner = Watched(kit.runner(views, config))
    return Scheduler(runner, config), runner


def prompts_for(kit: Kit, count: int, **lengths: int) -> list[list[int]]:
    return random_ids(kit.vocab_size, count, **lengths)
