"""What stands before every route: names, keys, bounds, headers, counting and one line of log. Knows HTTP; no model.

Plain ASGI, so that a stream passes through it piece by piece, and a client that hangs up is seen at once.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders

from detox_guard.server.config import is_loopback
from detox_guard.server.errors import ApiError, api_error, error_response
from detox_guard.server.logs import access
from detox_guard.server.replies import Gone

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from detox_guard.server.state import State

__all__ = ["OPEN", "Gate", "Visit"]

OPEN = frozenset({"/health", "/ready", "/", "/playground.css", "/playground.js"})
"""Routes without a key: probes, and a page that holds no secret."""
_ROUTES = OPEN | {
    "/metrics", "/openapi.json", "/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/moderations",
}  # fmt: skip
_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")


_ARRIVING = 64
"""The longest requests that may be on their way at once. Of shorter ones there may be more."""


@dataclass(eq=False)
class Visit:
    """One request, as it goes through."""

    id: str
    holder: str = "-"
    """Whose key it came with."""
    status: int = 0
    told: dict[str, Any] = field(default_factory=dict)
    """What else its line in the log says."""


class Gate:
    """The application behind it answers what passes. Refusals are in OpenAI's form and cost no seat."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self._app, self._state = app, state
        self._per_key: Counter[str] = Counter()
        self._under_way = 0
        self._arriving: Counter[str] = Counter()
        """Bytes of requests that are not whole yet, by whose they are."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's own."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        visit = Visit(given if _ID.fullmatch(given) else secrets.token_hex(12))
        scope["visit"] = visit
        began = time.perf_counter()

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                own = MutableHeaders(scope=message)
                own["X-Request-ID"] = visit.id
                for name, value in _HEADERS.items():
                    own.setdefault(name, value)
            try:
                async with asyncio.timeout(self._state.config.write_timeout_s):
                    await send(message)
            except (TimeoutError, OSError):
                raise Gone from None

        try:
            await self._pass(scope, receive, answer, headers, visit)
        except Gone:
            visit.told["gone"] = True
        except Exception as error:
            told = api_error(error)
            visit.told.setdefault("code", told.code)
            if told.status_code >= 500 and not isinstance(error, ApiError):
                visit.told["error"] = type(error).__name__
                access.debug("failed", exc_info=error)  # its words may be a client's
            if not visit.status:
                try:
                    await error_response(told)(scope, receive, answer)
                except Gone:
                    visit.told["gone"] = True
        finally:
            self._book(scope, visit, time.perf_counter() - began)

    async def _pass(self, scope: Scope, receive: Receive, send: Send, headers: Headers, visit: Visit) -> None:
        config, path = self._state.config, scope["path"]
        self._check_host(headers)
        self._check_origin(headers)
        if self._state.keys and path not in OPEN and scope["method"] != "OPTIONS":
            visit.holder = self._holder(headers)
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if int(headers.get("content-length") or 0) > config.max_body_bytes:
            raise _too_large(config.max_body_bytes)
        if self._state.ended.is_set():
            raise ApiError(503, "The server is being stopped.", "unavailable", headers={"Retry-After": "5"})
        self._check_room(visit)
        receive = await self._arrived(receive, visit.holder)
        self._check_room(visit)
        self._under_way += 1
        self._per_key[visit.holder] += 1
        self._state.meters.under_way.inc()
        try:
            await self._app(scope, receive, send)
        finally:
            self._under_way -= 1
            self._per_key[visit.holder] -= 1
            if not self._per_key[visit.holder]:
                del self._per_key[visit.holder]
            self._state.meters.under_way.dec()

    def _check_room(self, visit: Visit) -> None:
        config = self._state.config
        if self._under_way >= config.max_requests:
            raise _busy("This server takes no more requests at once.")
        if self._state.keys and self._per_key[visit.holder] >= config.max_requests_per_key:
            raise _busy("This key has too many requests under way.")

    async def _arrived(self, receive: Receive, holder: str) -> Receive:
        """`receive` once the whole body is here: one that is slow to come takes nobody's place. Raises `ApiError` for a
        body that is too long or too slow, `Gone`."""
        most, timeout_s = self._state.config.max_body_bytes, self._state.config.body_timeout_s
        body = bytearray()
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    piece = message.get("body", b"")
                    body += piece
                    self._arriving[holder] += len(piece)
                    if len(body) > most:
                        raise _too_large(most)
                    if self._arriving.total() > _ARRIVING * most:
                        raise _busy("Too many requests are on their way.")
                    if self._state.keys and self._arriving[holder] > _ARRIVING * most // 2:
                        raise _busy("This key has too many requests on their way.")
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise ApiError(408, "The request did not arrive in time.", "too_slow", headers=_CLOSE) from None
        finally:
            self._arriving[holder] -= len(body)
            if not self._arriving[holder]:
                del self._arriving[holder]
        whole: Message | None = {"type": "http.request", "body": bytes(body), "more_body": False}

        async def arrived() -> Message:
            nonlocal whole
            told, whole = whole, None
            return await receive() if told is None else told

        return arrived

    def _check_host(self, headers: Headers) -> None:
        """A page whose name was pointed at this machine is another site."""
        config = self._state.config
        allowed = config.allowed_hosts or (_LOOPBACK if is_loopback(config.host) else ())
        host = headers.get("host", "")
        name = host if host.count(":") > 1 and not host.startswith("[") else re.sub(r":\d+$", "", host)
        if allowed and name.lower() not in allowed:
            raise ApiError(421, "This server is not asked by that name.", "wrong_host")

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None or origin in self._state.config.cors_origins:
            return
        if re.sub(r"^https?://", "", origin) != headers.get("host"):
            raise ApiError(403, "This server does not answer pages of other sites.", "wrong_origin")

    def _holder(self, headers: Headers) -> str:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        holder = self._state.keys.holder(key.strip()) if scheme.lower() == "bearer" else None
        if holder is None:
            told = "Give an API key, as `Authorization: Bearer KEY`." if not key else "This API key is not known."
            raise ApiError(401, told, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return holder

    def _book(self, scope: Scope, visit: Visit, seconds: float) -> None:
        route = scope["path"] if scope["path"] in _ROUTES else "other"
        status = str(visit.status or 499)  # 499: hung up before an answer began
        self._state.meters.requests.labels(route, status).inc()
        self._state.meters.seconds.labels(route).observe(seconds)
        told = {
            "request_id": visit.id,
            "method": scope["method"],
            "route": route,
            "status": int(status),
            "ms": round(1000 * seconds, 1),
            "key": visit.holder,
            **visit.told,
        }
        access.info("request", extra={"told": told})


_CLOSE = {"Connection": "close"}


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"A request may have {most} bytes.", "too_large", headers=_CLOSE)


def _busy(why: str) -> ApiError:
    return ApiError(429, f"{why} Try again soon.", "busy", headers={"Retry-After": "1"})
