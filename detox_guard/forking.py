"""What a forked child must make anew: locks that another thread may have held, and threads that are not there.

Knows `os.fork`; knows nothing of who registers here.
"""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["in_children", "in_children_of"]

T = TypeVar("T")

_modules: list[Callable[[], None]] = []
_owners: weakref.WeakKeyDictionary[Any, Callable[[Any], None]] = weakref.WeakKeyDictionary()


def in_children(renew: Callable[[], None]) -> None:
    """Call `renew()` in every forked child, before anything else runs there. For a module's own locks."""
    _modules.append(renew)


def in_children_of(owner: T, renew: Callable[[T], None]) -> None:
    """Call `renew(owner)` in every child that is forked while `owner` lives. `renew` must not hold the owner."""
    _owners[owner] = renew


def _renew() -> None:
    for renew in _modules:
        renew()
    for owner, renew_owner in list(_owners.items()):
        renew_owner(owner)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
