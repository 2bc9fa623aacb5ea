"""Training a detoxifier: prompt tuning of a frozen backbone on toxic text (needs the `train` extra).

Importing this package loads no torch: `train_detoxifier` brings it along when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from detox_guard.training.config import TrainingConfig

if TYPE_CHECKING:
    from detox_guard.training.trainer import train_detoxifier

__all__ = ["TrainingConfig", "train_detoxifier"]


def __getattr__(name: str) -> object:
    if name != "train_detoxifier":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from detox_guard.training.trainer import train_detoxifier

    return train_detoxifier
