"""Asking a server for chats, and what its streams say."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Told", "opened", "post", "streamed"]

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 24}


@dataclass
class Told:
    """What one stream said."""

    status: int
    events: list[Any] = field(default_factory=list)

    @property
    def text(self) -> str:
        choices = [one for event in self.events if event != "[DONE]" for one in event.get("choices", ())]
        return "".join(choice["delta"].get("content", "") for choice in choices)

    @property
    def error(self) -> str | None:
        """The code of the error with which it ended."""
        return next((event["error"]["code"] for event in self.events if "error" in event), None)

    @property
    def reason(self) -> str | None:
        choices = [one for event in self.events if event != "[DONE]" for one in event.get("choices", ())]
        return choices[-1]["finish_reason"] if choices else None


def post(url: str, **changes: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json={**BODY, **changes}, timeout=300, trust_env=False)


@contextmanager
def opened(url: str, **changes: Any) -> Iterator[tuple[int, Iterator[Any]]]:
    """A stream under way: its status and its events."""
    body = {**BODY, "stream": True, **changes}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=300, trust_env=False) as response:
        yield response.status_code, _events(response.iter_text())


def _events(pieces: Iterator[str]) -> Iterator[Any]:
    """By hand: httpx's lines also end at characters that a text may hold."""
    read = ""
    for piece in pieces:
        *whole, read = (read + piece).split("\n\n")
        for one in whole:
            if one.startswith("data: "):
                yield one[6:] if one == "data: [DONE]" else json.loads(one[6:])


def streamed(url: str, begun: Callable[[], object] = lambda: None, **changes: Any) -> Told:
    """A whole stream. `begun` is called at its first words."""
    with opened(url, **changes) as (status, events):
        told, silent = Told(status), True
        for event in events:
            told.events.append(event)
            if silent and told.text:
                silent = False
                begun()
    if silent:
        begun()
    return told
