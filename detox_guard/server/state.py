"""What all requests of one server share. Knows who holds what; does nothing by itself."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from detox_guard.errors import InvalidParamsError
from detox_guard.guard.audit import check_log
from detox_guard.scorers.base import load_scorer
from detox_guard.server.config import is_loopback
from detox_guard.server.keys import Keys
from detox_guard.server.meters import Meters, Timed

if TYPE_CHECKING:
    from detox_guard.server.config import ServerConfig
    from detox_guard.server.models import Models

__all__ = ["State"]


class State:
    """Everything of one server."""

    config: ServerConfig
    keys: Keys

    def __init__(self, models: Models, config: ServerConfig, keys: Keys | None = None) -> None:
        """`keys`: None reads those of the configuration. Raises `DataError`, `InvalidParamsError`, `ScorerError`."""
        self.models = models
        self.meters = Meters(models)
        self.draining = False
        """No new work is wanted: `/ready` says so."""
        self.ended = asyncio.Event()
        """The time to drain is over: what is still under way ends with an error."""
        self.configure(config, keys)

    def configure(self, config: ServerConfig, keys: Keys | None = None) -> None:
        """Take these bounds and keys from now on. Raises as the constructor, also for an address that others reach
        without keys, and then changes nothing."""
        keys = Keys.read(config.api_keys) if keys is None else keys
        if not (keys or is_loopback(config.host)):
            raise InvalidParamsError(
                "host",
                config.host,
                "loopback, as there are no API keys",
                hint="`detox-guard key NAME --file keys.txt`, then --api-keys keys.txt",
            )
        if config.guard is not None:
            if config.guard.audit_log is not None:
                check_log(config.guard.audit_log)
            timed = Timed(load_scorer(config.guard.scorer), self.meters)
            config = config.replace(guard=config.guard.replace(scorer=timed))
        self.config, self.keys = config, keys

    @property
    def loose(self) -> bool:
        """Whether requests may loosen their guard."""
        if self.config.allow_unguarded is not None:
            return self.config.allow_unguarded
        return not self.keys and is_loopback(self.config.host)
