"""What a forked child must make anew: locks that another thread may have held, and threads that are not there.

Knows `os.fork`, and that tqdm has a lock that loading a model takes; knows nothing of who registers here.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["around_forks_of", "in_children", "in_children_of"]

T = TypeVar("T")

_modules: list[Callable[[], None]] = []
_owners: weakref.WeakKeyDictionary[Any, Callable[[Any], None]] = weakref.WeakKeyDictionary()
_workers: weakref.WeakKeyDictionary[Any, tuple[Callable[[Any], None], Callable[[Any], None]]]
_workers = weakref.WeakKeyDictionary()
_held: dict[int, list[Callable[[], None]]] = {}
"""By thread that forks: what to call when it has."""


def in_children(renew: Callable[[], None]) -> None:
    """Call `renew()` in every forked child, before anything else runs there. For a module's own locks."""
    _modules.append(renew)


def in_children_of(owner: T, renew: Callable[[T], None]) -> None:
    """Call `renew(owner)` in every child that is forked while `owner` lives. `renew` must not hold the owner."""
    _owners[owner] = renew


def around_forks_of(owner: T, hold: Callable[[T], None], release: Callable[[T], None]) -> None:
    """Call `hold(owner)` before this process forks, and `release(owner)` after. Native code has locks that nobody can
    make anew: while it is at rest, none of them is held. `hold` must not wait for ever."""
    _workers[owner] = (hold, release)


def _hold() -> None:
    held = _held[threading.get_ident()] = []
    for owner, (hold, release) in list(_workers.items()):
        hold(owner)
        held.append(functools.partial(release, owner))


def _release() -> None:
    for release in _held.pop(threading.get_ident(), ()):
        release()


def _renew_bars() -> None:
    """tqdm's lock, under which transformers shows a bar while it loads, is even shared with the parent: a child that is
    killed while it holds it would stop the parent too."""
    if (std := sys.modules.get("tqdm.std")) is None:
        return
    lock, kinds = threading.RLock(), [std.tqdm]
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        if "_lock" in vars(kind):
            kind._lock = lock


def _renew() -> None:
    _held.clear()
    _renew_bars()
    for renew in _modules:
        renew()
    for owner, renew_owner in list(_owners.items()):
        renew_owner(owner)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_renew)
