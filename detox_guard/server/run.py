"""A server as a process: its socket, its signals, its end. Knows uvicorn; leaves requests to the application.

SIGTERM and Ctrl-C: no new connections; what is under way has `drain_s` to come to its end. SIGHUP: the configuration
is read again.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import uvicorn

from detox_guard.errors import DetoxGuardError, InvalidParamsError
from detox_guard.server.app import create_app
from detox_guard.server.connection import PatientProtocol

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from detox_guard.server.config import ServerConfig
    from detox_guard.server.keys import Keys
    from detox_guard.server.state import State

__all__ = ["Server"]

_log = logging.getLogger("detox_guard.server")
_SOCKETS = 65_536
_LAST_WORDS_S = 5
"""For the errors with which replies end that did not come to their end in time."""
_RETIRING_S = 1.0
"""How often it is looked whether models that were taken out are closed."""


class Server(uvicorn.Server):
    """uvicorn's, with our bounds and signals: `run` serves until a signal says to stop, then closes the models."""

    def __init__(
        self,
        models: Mapping[str, Any],
        config: ServerConfig,
        *,
        keys: Keys | None = None,
        reload: Callable[[State], Awaitable[None]] | None = None,
        on_ready: Callable[[str], object] | None = None,
    ) -> None:
        """`reload` is awaited on SIGHUP; what it raises is logged, and all stays as it was. `on_ready` gets the
        address. Raises `InvalidParamsError` for an address that others can reach without keys, or that cannot be had.
        """
        app = create_app(models, config, keys=keys, own=True)
        self.state: State = app.state.detox_guard
        self._reload, self._on_ready = reload, on_ready
        self._reloading: set[asyncio.Task[None]] = set()
        self._listener = _listen(config.host, config.port)
        super().__init__(
            uvicorn.Config(
                app,
                http=PatientProtocol,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=int(config.drain_s) + _LAST_WORDS_S,
            )
        )

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Until it is told to stop."""
        _allow_many_sockets()
        super().run([self._listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's; then say where."""
        await super().startup(sockets)
        if self._reload is not None and hasattr(signal, "SIGHUP"):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._start_reload)
        if self._on_ready is not None:
            self._on_ready(self.url)
        _settle()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's; what is under way ends with an error once the time to drain is over."""
        self.state.draining = True
        asyncio.get_running_loop().call_later(self.state.config.drain_s, self.state.ended.set)
        try:
            await super().shutdown(sockets)
        finally:
            gc.unfreeze()

    def _start_reload(self) -> None:
        task = asyncio.create_task(self._reload_now())
        self._reloading.add(task)
        task.add_done_callback(self._reloading.discard)

    async def _reload_now(self) -> None:
        assert self._reload is not None
        try:
            await self._reload(self.state)
        except DetoxGuardError as error:
            _log.error("the configuration was not read again: %s", error)
        except Exception as error:
            _log.error("the configuration was not read again: %s", type(error).__name__)
        else:
            _log.info("the configuration was read again")
            gc.unfreeze()  # what was taken out is garbage as soon as it is closed
            while self.state.models.retiring:
                await asyncio.sleep(_RETIRING_S)
            _settle()


def _settle() -> None:
    """What lives now, libraries and models, stays. Looked through for garbage under way, as Python does now and then,
    it would hold up every request: .2 s for 430,000 objects."""
    gc.unfreeze()
    gc.collect()
    gc.collect()  # what finalizers of the first one let go
    gc.freeze()


def _allow_many_sockets() -> None:
    """As many as the system lets this process have: the 1024 of many systems could be taken by idle clients alone."""
    try:
        import resource
    except ImportError:  # Windows knows no such bound
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _SOCKETS if hard == resource.RLIM_INFINITY else min(hard, _SOCKETS)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(ValueError, OSError):  # some systems allow less than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises `InvalidParamsError`."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise InvalidParamsError("port", f"{host}:{port}", f"an address that can be had: {error.strerror}") from error
