"""One connection: HTTP as uvicorn speaks it, with an end to its patience. Knows sockets and timers; knows no route."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    import asyncio

    from detox_guard.server.state import State

__all__ = ["PatientProtocol"]

_LINGER_S = 2.0
"""A request that was refused half-way has so long to be sent, unread: closing at once would take the answer back."""


class PatientProtocol(H11Protocol):
    """HTTP with an end to its patience: a request whose head does not arrive, or an answer that nobody takes."""

    _head_timer: asyncio.TimerHandle | None = None
    _refusing = False

    def send_400_response(self, msg: str) -> None:
        self._refusing = True
        super().send_400_response(msg)

    @property
    def is_read(self) -> bool:
        """Nothing of a request is still on its way."""
        return not self._refusing and (self.cycle is None or not self.cycle.more_body)

    def refuse(self) -> None:
        """What still comes is thrown away."""
        self._refusing = True

    def connection_made(self, transport: Any) -> None:
        super().connection_made(cast("asyncio.Transport", _Lingering(transport, self)))
        seconds = self._state_of_ours.config.write_timeout_s
        own = transport.get_extra_info("socket")
        if hasattr(socket, "TCP_USER_TIMEOUT") and own.family in (socket.AF_INET, socket.AF_INET6):
            own.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * seconds))
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._refusing:
            return
        super().data_received(data)
        if self._between_requests:
            self._await_head()
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    @property
    def _state_of_ours(self) -> State:
        state: State = self.config.app.state.detox_guard  # type: ignore[union-attr]
        return state

    @property
    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self._state_of_ours.config.body_timeout_s, self._give_up)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        if self._between_requests:
            self.transport.close()


class _Lingering:
    """A transport that closes softly where a request is still on its way."""

    def __init__(self, transport: Any, protocol: PatientProtocol) -> None:
        self._transport, self._protocol = transport, protocol
        self._closing = False

    def close(self) -> None:
        """Let the answer go out first."""
        if self._protocol.is_read:
            self._transport.close()
        elif not self._closing:
            self._closing = True
            self._protocol.refuse()
            if self._transport.can_write_eof():
                self._transport.write_eof()
            self._protocol.loop.call_later(_LINGER_S, self._transport.close)

    def is_closing(self) -> bool:
        """Nothing more is to be written."""
        return self._closing or bool(self._transport.is_closing())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
