"""A server on a free port of this machine, in a thread of the test's process."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import uvicorn
from waiting import wait_until

from detox_guard.server import create_app

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastapi import FastAPI

__all__ = ["CHAT", "chat", "client_of", "events", "listening", "served", "text_of"]

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The address of `app`, which answers as long as the block lasts."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not end"


@contextmanager
def served(model: Any, *args: Any, **kwargs: Any) -> Iterator[httpx.Client]:
    """A client of a server of this model."""
    with listening(create_app(model, *args, **kwargs)) as url, client_of(url) as client:
        yield client


def client_of(url: str, **headers: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False)


def chat(client: httpx.Client, **changes: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={**CHAT, **changes})


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """What a stream said; it must end as it should."""
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith(("data: ", ":")) for line in lines), lines
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(line) for line in data[:-1]]


def text_of(told: list[dict[str, Any]], index: int = 0) -> str:
    """The text of one choice of a stream."""
    choices = [choice for one in told for choice in one.get("choices", ()) if choice["index"] == index]
    return "".join(c["delta"].get("content") or "" if "delta" in c else c["text"] for c in choices)
