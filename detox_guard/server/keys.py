"""API keys: made, hashed, looked up. Knows hashes and files; knows no HTTP.

A key is 256 random bits, so a plain SHA-256 of it cannot be turned back. A file holds hashes alone.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from detox_guard.errors import DataError, InvalidParamsError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["VARIABLE", "Keys", "new_key"]

VARIABLE = "DETOX_GUARD_API_KEYS"
_SHORTEST = 20
"""Characters. A shorter key could be guessed."""
_LINE = re.compile(r"([\w.@-]{1,64}) sha256:([0-9a-f]{64})")


class Keys:
    """Hashes of the keys that are let in, each with its holder's name. False if there are none."""

    def __init__(self, holders: Mapping[str, str]) -> None:
        """`holders`: SHA-256 in hex to name."""
        self._holders = tuple((bytes.fromhex(digest), name) for digest, name in holders.items())

    def __len__(self) -> int:
        return len(self._holders)

    @classmethod
    def read(cls, path: str | Path | None = None, environ: Mapping[str, str] | None = None) -> Keys:
        """From a file and from the environment. Raises `DataError` for a bad line, `InvalidParamsError` for a key that
        is too short; neither tells the key.
        """
        holders: dict[str, str] = {}
        if path is not None:
            try:
                lines = Path(path).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"api_keys: {error}", hint="`detox-guard key NAME --file FILE` makes one") from error
            for number, line in enumerate(lines, 1):
                if not line.strip() or line.lstrip().startswith("#"):
                    continue
                match = _LINE.fullmatch(line.strip())
                if match is None:
                    raise DataError(f"api_keys: line {number} is not `NAME sha256:HASH`")
                holders[match[2]] = match[1]
        written = (os.environ if environ is None else environ).get(VARIABLE, "")
        for number, key in enumerate(filter(None, map(str.strip, written.split(","))), 1):
            if len(key) < _SHORTEST:
                raise InvalidParamsError(VARIABLE, f"key {number}", f"at least {_SHORTEST} characters")
            holders.setdefault(_hash(key).hex(), f"env{number}")
        return cls(holders)

    def holder(self, key: str) -> str | None:
        """Whose key it is; None for nobody's. All are compared, so time tells nothing."""
        digest = _hash(key)
        found = None
        for known, name in self._holders:
            if hmac.compare_digest(known, digest):
                found = name
        return found


def new_key(name: str) -> tuple[str, str]:
    """A fresh key, and the line of the file that lets it in. Raises `InvalidParamsError` for a bad name."""
    key = f"dg-{secrets.token_urlsafe(32)}"
    line = f"{name} sha256:{_hash(key).hex()}"
    if not _LINE.fullmatch(line):
        raise InvalidParamsError("name", name, "letters, digits and . _ - @, 64 at most")
    return key, line


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
