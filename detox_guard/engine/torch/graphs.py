"""Steps that a GPU replays as a whole. Knows CUDA graphs; knows no step.

A step of a model with many layers is hundreds of small kernels, and starting each costs more than running it. Recorded
as a graph they are started at once. It reads and writes where it did when it was recorded.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["recorder_for"]

_WARM_UP = 2
"""Runs before a recording: what a library makes ready at first use cannot be recorded."""


def recorder_for(device: torch.device) -> Callable[[Callable[[], Tensor]], Callable[[], Tensor]] | None:
    """What records a step on this device; None where there is nothing that can."""
    return partial(_cuda_graph, device) if device.type == "cuda" else None


def _cuda_graph(device: torch.device, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`run`, recorded on `device`. Its result lies in one place and is good until the next call.

    Raises `RuntimeError`.
    """
    with torch.cuda.device(device):  # a thread's own is the first one
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(_WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # Other threads (a scorer) may use the GPU meanwhile.
        with torch.cuda.graph(graph, stream=beside, capture_error_mode="thread_local"):
            out = run()
        out.zero_()  # what a replay gives is its own

    def replay() -> Tensor:
        with torch.cuda.device(device):
            graph.replay()
        return out

    return replay
