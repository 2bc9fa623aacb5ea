"""The models that a server holds, by name, and how they are exchanged under way. Knows who uses which; loads nothing.

A model that was taken out is closed once its last request is over, so no request is lost to a reload.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from detox_guard.errors import InvalidParamsError
from detox_guard.server.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Mapping

    from detox_guard.results import Chunk
    from detox_guard.settings import DecodingParams

__all__ = ["Model", "Models", "Served"]


class Model(Protocol):
    """What a server asks of a model: a `DetoxiGen`, a scripted one, or an engine elsewhere. Its `unstreamed`, where it
    has one, is asked for replies that are not streamed."""

    @property
    def model_id(self) -> str: ...

    @property
    def params(self) -> DecodingParams: ...

    @property
    def closed(self) -> bool: ...

    def astream(
        self, prompt: Any, params: DecodingParams | None = None, **changes: Any
    ) -> AsyncGenerator[Chunk, None]: ...

    def close(self) -> None: ...


@dataclass(eq=False)
class Served:
    """One model under its name."""

    name: str
    model: Model
    created: int = field(default_factory=lambda: int(time.time()))
    users: int = 0

    def told(self) -> dict[str, Any]:
        """As `/v1/models` tells it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "detox-guard",
            "detox": {
                "base": self.model.model_id,
                "steered": bool(getattr(self.model, "detoxifier_ids", ())),
                "context_window": getattr(self.model, "context_window", None),
                "chat": bool(getattr(self.model, "has_chat_template", True)),
                "tools": bool(getattr(self.model, "supports_tools", False)),
            },
        }


class Models:
    """Models by name. Used on the event loop's thread only."""

    def __init__(self, models: Mapping[str, Model], *, own: bool) -> None:
        """`own`: closing them is up to this object. Raises `InvalidParamsError` for none."""
        if not models:
            raise InvalidParamsError("model", {}, "at least one model")
        self._own = own
        self._served = {name: Served(name, model) for name, model in models.items()}
        self._retired: list[Served] = []
        """Taken out: each is closed as soon as nobody uses it."""

    def __iter__(self) -> Iterator[Served]:
        return iter(self._served.values())

    @property
    def ready(self) -> bool:
        """All of them can be asked."""
        return not any(one.model.closed for one in self)

    @property
    def retiring(self) -> bool:
        """Some that were taken out are in use yet."""
        return bool(self._retired)

    def find(self, name: str | None) -> Served:
        """The one of that name; the first for None. Raises `ApiError` (404)."""
        if name is None:
            return next(iter(self))
        if name not in self._served:
            there = ", ".join(self._served)
            raise ApiError(404, f"No model {name[:80]!r} here, but: {there}.", "model_not_found", param="model")
        return self._served[name]

    @contextmanager
    def use(self, served: Served) -> Iterator[Model]:
        """Inside the block it is not closed."""
        served.users += 1
        try:
            yield served.model
        finally:
            served.users -= 1
            self._close_idle(served)

    def replace(self, models: Mapping[str, Model]) -> None:
        """These instead. What stays (the same object) goes on as it is."""
        before = self._served
        kept = {id(one.model): one for one in before.values()}
        self._served = {}
        for name, model in models.items():
            old = kept.get(id(model))
            self._served[name] = old if old is not None and old.name == name else Served(name, model)
        staying = {id(one.model) for one in self}
        for one in before.values():
            if id(one.model) not in staying:
                self._retired.append(one)
                self._close_idle(one)

    def close(self) -> None:
        """Close all that are its own."""
        for one in self:
            if self._own:
                one.model.close()

    def _close_idle(self, served: Served) -> None:
        if served in self._retired and not served.users:
            self._retired.remove(served)
            if self._own:
                served.model.close()
