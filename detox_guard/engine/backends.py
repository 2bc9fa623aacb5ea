"""Which runner serves a backbone. Knows the runners by name only."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.detoxifiers.base import View
    from detox_guard.engine.base import Bounds
    from detox_guard.engine.runner import Runner
    from detox_guard.models.backbone import Backbone

__all__ = ["runner_of"]


def runner_of(backbone: Backbone, views: Sequence[View], bounds: Bounds) -> Runner:
    """llama.cpp for a backbone that is a GGUF, else torch. Raises `BackboneError` where it cannot serve."""
    if backbone.gguf is not None:
        from detox_guard.engine.llamacpp.runner import LlamaRunner

        return LlamaRunner(backbone, views, bounds)
    from detox_guard.engine.torch.runner import torch_runner

    return torch_runner(backbone, views, bounds)
