"""The models of this process: one for the same arguments. Knows keys and locks; does not load."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from detox_guard._forking import in_children
from detox_guard.errors import InvalidParamsError
from detox_guard.settings import EngineConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from detox_guard.detoxigen import DetoxiGen

__all__ = ["shared_model"]


@dataclass
class _Entry:
    """One model, and the lock that concurrent callers wait on while it loads."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    model: DetoxiGen | None = None


_entries: dict[tuple[Any, ...], _Entry] = {}
_entries_lock = threading.Lock()


def _forget() -> None:
    """A forked child has neither the parent's engine threads nor a say over its locks."""
    global _entries_lock
    _entries_lock = threading.Lock()
    _entries.clear()


in_children(_forget)


def shared_model(load: Callable[..., DetoxiGen], model: object, **arguments: Any) -> DetoxiGen:
    """`load(model, **arguments)`, once a process for equal arguments, until the model is closed.

    A load that fails is not remembered. Raises what `load` raises, and `InvalidParamsError` for loaded objects.
    """
    entry = _entry(_key(model, **arguments))
    with entry.lock:
        if entry.model is None or entry.model.closed:
            entry.model = load(model, **arguments)
        return entry.model


def _entry(key: tuple[Any, ...]) -> _Entry:
    with _entries_lock:
        return _entries.setdefault(key, _Entry())


def _key(model: object, *, detoxifier: Any, config: EngineConfig | None, **loading: Any) -> tuple[Any, ...]:
    """Equal for calls that load the same: "cpu" and no device are one where there is nothing better than a CPU."""
    from detox_guard.models.backbone import pick_device, pick_dtype
    from detox_guard.models.options import LoadOptions

    named = {"model": model, "detoxifier": detoxifier}
    for name, value in named.items():
        if value is not None and value != () and not isinstance(value, str | os.PathLike):
            raise InvalidParamsError(name, value, "a name or a path, to be shared", hint="use from_pretrained")
    options = LoadOptions(**loading)
    on_device = pick_device(options.one_device)
    return (
        *(_place(value) for value in named.values()),
        "" if options.spreads else _device_name(on_device),
        "auto" if options.dtype == "auto" else str(pick_dtype(options.dtype, on_device)),
        options.key(),
        config or EngineConfig(),
    )


def _device_name(device: torch.device) -> str:
    """One name a device: "cpu:0" is the CPU, and "cuda" is the current one."""
    import torch

    if device.type == "cuda":
        return f"cuda:{torch.cuda.current_device() if device.index is None else device.index}"
    return device.type if device.index in (None, 0) else str(device)


def _place(name: Any) -> str | None:
    """A folder or file by its real path, a hub id as it is; `()` is no detoxifier at all, None is "auto"."""
    if name == ():
        return "()"
    return None if name in (None, "auto") else os.path.realpath(name) if os.path.exists(name) else str(name)
