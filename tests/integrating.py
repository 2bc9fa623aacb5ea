"""What the tests of all integrations ask in the same way: the event loop, seats, and a model of one's own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from waiting import await_until

from detox_guard import DetoxiGen
from detox_guard.models.default import default_backbone_dir
from detox_guard.testing import ScriptedDetoxiGen

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from pathlib import Path

__all__ = ["BAD_LOADING", "cancel_in_its_seat", "keeps_turning", "own_copy", "record_loading"]

BAD_LOADING = [
    ({"device": "cpu", "device_map": "auto"}, "device"),
    ({"offload_folder": "x"}, "offload_folder"),
    ({"quantization_config": "int3"}, "quantization_config"),
    ({"attn_implementation": "flash_attention_2"}, "attn_implementation"),
    ({"model_kwargs": {"use_safetensors": False}}, "model_kwargs.use_safetensors"),
    ({"detoxigen": ScriptedDetoxiGen(), "device_map": "auto"}, "detoxigen"),
]
"""Ways of loading that are refused at once, and the field that is named."""


async def keeps_turning(*work: Coroutine[Any, Any, Any]) -> list[Any]:
    """The results of work that leaves the event loop free: one that decoded itself would turn a few times a token."""
    results = asyncio.gather(*work)
    turns = 0
    while not results.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 1000
    return await results


async def cancel_in_its_seat(model: DetoxiGen, work: Coroutine[Any, Any, Any]) -> None:
    """A task that is cancelled while its reply is decoded frees the seat."""
    task = asyncio.create_task(work)
    await await_until(lambda: model.stats().seats)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await model.agenerate("Hello.", max_new_tokens=1)  # by then the engine has looked at who left
    assert not model.stats().seats


def own_copy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The default model as one's own: under another name, where nothing was trained for it."""
    original = default_backbone_dir()
    monkeypatch.setenv("DETOX_GUARD_CACHE", str(folder / "cache"))
    own = folder / "our-own-model"
    own.mkdir()
    for file in original.iterdir():
        (own / file.name).symlink_to(file)
    return str(own)


def record_loading(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `DetoxiGen.shared` is asked for from now on; a scripted model comes back."""
    asked: list[dict[str, Any]] = []

    def shared(model: str | None = None, **names: Any) -> ScriptedDetoxiGen:
        asked.append({"model": model, **{name: value for name, value in names.items() if value is not None}})
        return ScriptedDetoxiGen()

    monkeypatch.setattr(DetoxiGen, "shared", shared)
    return asked
