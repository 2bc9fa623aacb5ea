"""A client that costs little, as it shares two cores with the server it loads. Knows as much of HTTP/1.1 as our server
speaks; knows no load.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

__all__ = ["Line"]

_LONGEST = 1 << 24
"""Bytes of a line or a piece."""


class Line:
    """One connection to a server on this machine, kept from request to request; made anew where it was lost."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._headers: dict[bytes, bytes] = {}

    async def post(self, path: str, body: dict[str, Any]) -> int:
        """Ask; the status of the answer, whose `pieces` have to be read next. Raises `OSError`, `EOFError`."""
        sent = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(sent)}\r\n\r\n"
        )
        if self._writer is None or self._reader is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=_LONGEST)
        self._writer.write(head.encode() + sent)
        await self._writer.drain()
        lines = (await self._reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        self._headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines[1:] if line)
        }
        return int(lines[0].split()[1])

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The answer as the server wrote it, a piece a write. Raises `EOFError` where it breaks off."""
        assert self._reader is not None
        if b"content-length" in self._headers:
            yield await self._reader.readexactly(int(self._headers[b"content-length"]))
        else:
            while size := int(await self._reader.readuntil(b"\r\n"), 16):
                yield await self._reader.readexactly(size)
                await self._reader.readexactly(2)
            await self._reader.readexactly(2)
        if self._headers.get(b"connection", b"").lower() == b"close":
            self.hang_up()

    async def whole(self) -> bytes:
        """All of the answer."""
        return b"".join([piece async for piece in self.pieces()])

    def hang_up(self) -> None:
        """In the middle of an answer, or behind it."""
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None
