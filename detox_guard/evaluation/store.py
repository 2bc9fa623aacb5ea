"""A run's folder: `run.json` (what was asked), `samples.jsonl` and `scores.jsonl`, whose rows survive a kill.

Knows no figures."""

from __future__ import annotations

import json
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from detox_guard._files import hold_folder, read_json
from detox_guard.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from detox_guard.evaluation.methods import Method

__all__ = [
    "KEY",
    "RUN_FILE",
    "SAMPLES_FILE",
    "SCORES_FILE",
    "SCORE_KEY",
    "Journal",
    "all_methods",
    "load_run",
    "open_run",
    "stored_replies",
    "stored_scores",
]

RUN_FILE, SAMPLES_FILE, SCORES_FILE = "run.json", "samples.jsonl", "scores.jsonl"
KEY, SCORE_KEY = ("method", "prompt", "sample"), ("judge", "method", "prompt")
Key = tuple[Any, ...]
FLUSH_S = 1.0


class Journal:
    """Rows by `key` fields, in a file of JSON lines that grows with the work.

    A line cut off by a kill is dropped, so its row is simply made again; of equal keys the last row counts. Not for two
    processes at once: the caller holds the lock. Raises `DataError`, also for what an older version left half done.
    """

    def __init__(self, path: Path, key: tuple[str, ...]) -> None:
        self.path, self._fields = path, key
        self.rows: dict[Key, dict[str, Any]] = {}
        if (part := path.with_name(path.name + ".part")).exists():
            raise DataError(
                f"{part}: an older version was cut off here", hint=f"append it to {path.name}, or remove it"
            )
        content = path.read_bytes() if path.exists() else b""
        self._whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[: self._whole].split(b"\n")[:-1], start=1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}: line {number}: not JSON ({error})") from error
            self.rows[self._key(row)] = row  # a later one is of a judge who judged anew
        self._file: Any = None
        self._waiting: list[str] = []
        self._flushed_s = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    def __contains__(self, key: Key) -> bool:
        return key in self.rows

    def add(self, row: dict[str, Any]) -> None:
        """Take one row; it is on the disk within a second of work, or at `flush`."""
        self.rows[self._key(row)] = row
        self._waiting.append(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        if time.monotonic() - self._flushed_s > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Append what waits, one write for all, on the disk when this returns."""
        if not self._waiting:
            return
        try:
            if self._file is None:
                self._file = self.path.open("ab")
                self._file.truncate(self._whole)  # what a kill cut off
            self._file.write("".join(self._waiting).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written: {error}") from error
        self._waiting.clear()
        self._flushed_s = time.monotonic()

    def _key(self, row: Mapping[str, Any]) -> Key:
        try:
            return tuple(row[field] for field in self._fields)
        except (KeyError, TypeError):
            raise DataError(
                f"{self.path}: a row without {', '.join(self._fields)}", hint="is it of this run?"
            ) from None


@contextmanager
def open_run(folder: Path) -> Iterator[None]:
    """Hold a run's folder, made unless it is there. Raises `DataError` while another process holds it."""
    with hold_folder(folder, "measuring into it"):
        yield


def load_run(folder: Path) -> dict[str, Any]:
    """What `run.json` holds: what was asked, and of which methods. Raises `DataError` unless all samples are there."""
    run: dict[str, Any] = read_json(folder / RUN_FILE) if (folder / RUN_FILE).is_file() else {"methods": {}}
    wanted = len(run["methods"]) * len(run.get("prompts", ())) * run.get("samples", 0)
    if not wanted or len(Journal(folder / SAMPLES_FILE, KEY).rows) < wanted:
        raise DataError(f"{folder}: no whole run in it", hint="give the command that made it again, to finish it")
    return run


def all_methods(
    path: Path, identity: dict[str, Any], methods: Sequence[Method], beside: Collection[str] = ()
) -> dict[str, Any]:
    """What each method is, by name: of `methods`, and of those of a run that is there already.

    `beside`: what a run tells that does not make it another one. Raises `DataError` if it is another run, or means
    something else by a name.
    """
    known: dict[str, Any] = {}
    if path.exists():
        old, new = read_json(path), json.loads(json.dumps(identity))
        for name in dict.fromkeys((*new, *old)):
            # What only one of them tells counts too: a rounding, an adapter.
            if name not in ("methods", *beside) and old.get(name) != new.get(name):
                raise DataError(
                    f"{path.parent}: holds a run of another {name}", hint="take another folder, or remove it"
                )
        known = old["methods"]
    for method in methods:
        mine = json.loads(json.dumps(method.identity()))
        stored = known.setdefault(method.name, mine)
        if {part: stored.get(part) for part in mine} != mine:
            raise DataError(
                f"{path.parent}: holds another {method.name!r}", hint="take another folder for other settings"
            )
    return known


def stored_scores(folder: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Rows of `scores.jsonl` by judge, method and prompt: `scores` of a judge of toxicity, `nll` and `tokens` of a
    language model."""
    return Journal(folder / SCORES_FILE, SCORE_KEY).rows


def stored_replies(folder: Path, run: dict[str, Any]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """All samples of each method and prompt that has all of them."""
    rows = Journal(folder / SAMPLES_FILE, KEY).rows
    samples = range(run["samples"])
    return {
        (method, i): [rows[method, i, j] for j in samples]
        for method in run["methods"]
        for i in range(len(run["prompts"]))
        if all((method, i, j) in rows for j in samples)
    }
