"""What a fork waits for, and what its child must make anew: locks that another thread may have held, and threads that
are not there.

Knows `os.fork`, and that tqdm has a lock that loading a model takes; knows nothing of who registers here.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["in_children", "in_children_of", "native_work"]

T = TypeVar("T")

_modules: list[Callable[[], None]] = []
_owners: weakref.WeakKeyDictionary[Any, Callable[[Any], None]] = weakref.WeakKeyDictionary()
_FORK_WAIT_S = 5.0
"""The longest that a fork waits for native work."""


def in_children(renew: Callable[[], None]) -> None:
    """Call `renew()` in every forked child, before anything else runs there. For a module's own locks."""
    _modules.append(renew)


def in_children_of(owner: T, renew: Callable[[T], None]) -> None:
    """Call `renew(owner)` in every child that is forked while `owner` lives. `renew` must not hold the owner."""
    _owners[owner] = renew


class _Gate:
    """Between native work and forks. Native code has locks that no child can make anew: while no work is under way,
    none of them is held."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._depths: dict[int, int] = {}
        """By thread at work: how often it came in."""
        self._forking: set[int] = set()
        """Threads that are about to fork."""

    def enter(self) -> None:
        me = threading.get_ident()
        with self._changed:
            if not self._changed.wait_for(lambda: not self._forking or me in self._depths, 2 * _FORK_WAIT_S):
                self._forking.clear()  # Ctrl-C may have cut off the end of a fork
            self._depths[me] = self._depths.get(me, 0) + 1

    def leave(self) -> None:
        me = threading.get_ident()
        with self._changed:
            self._depths[me] -= 1
            if not self._depths[me]:
                del self._depths[me]
                self._changed.notify_all()

    def hold(self) -> None:
        """Wait for the work of other threads, but not for ever, and let no more begin."""
        me = threading.get_ident()
        with self._changed:
            self._forking.add(me)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._depths.keys() <= self._forking, _FORK_WAIT_S)

    def release(self) -> None:
        with self._changed:
            self._forking.discard(threading.get_ident())
            self._changed.notify_all()

    def renew(self) -> None:
        """In a child only the thread that forked is left, with the work that it was in."""
        me = threading.get_ident()
        self._changed = threading.Condition()
        self._depths = {me: self._depths[me]} if me in self._depths else {}
        self._forking = set()


_gate = _Gate()


@contextmanager
def native_work() -> Iterator[None]:
    """Around work in native code that takes locks, such as torch's or llguidance's: a fork waits for its end, five
    seconds at most, and all such work waits for a fork. Should not wait for another thread's."""
    _gate.enter()
    try:
        yield
    finally:
        _gate.leave()


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
    _gate.renew()
    _renew_bars()
    for renew in _modules:
        renew()
    for owner, renew_owner in list(_owners.items()):
        renew_owner(owner)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_gate.hold, after_in_parent=_gate.release, after_in_child=_renew)
