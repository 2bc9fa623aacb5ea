"""What a figure was measured on. Knows the operating system; knows no model."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["machine", "peak_memory_mib", "versions"]


def machine(device: torch.device) -> dict[str, Any]:
    """The CPU, its cores and vector instructions, torch's threads, and the GPU if `device` is one."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "device": str(device),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def versions() -> dict[str, str]:
    """Of Python, this package and what the figures depend on."""
    from detox_guard import __version__

    found = {"python": platform.python_version(), "detox-guard": __version__}
    for name in ("torch", "transformers", "numpy"):
        found[name] = importlib.metadata.version(name)
    return found


def peak_memory_mib(device: torch.device) -> float | None:
    """The most this process ever held: of GPU memory if `device` is one, else resident; None where that is unknown."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
