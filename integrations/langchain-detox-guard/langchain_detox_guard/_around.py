"""What LangChain puts around a model, so that nothing bound or configured is lost. Knows wrappers; knows no field."""

from __future__ import annotations

from collections.abc import Sequence  # noqa: TC003  (LangChain reads the annotations of public methods)
from typing import Any, cast

from langchain_core.runnables import Runnable, RunnableConfig  # noqa: TC002
from langchain_core.runnables.base import RunnableBinding


class Around:
    """What LangChain puts around a model, or around what is around one: whatever comes on top keeps it."""

    @classmethod
    def _bound(cls) -> type[Bound]:
        return Bound

    def _sorted(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The keywords that set a field of it, and the others."""
        return {}, kwargs

    def bind(self, **kwargs: Any) -> Any:
        """LangChain's. What names a field is checked now and set in the model, so that nothing bound later loses it."""
        return self._bound()(bound=cast("Any", self)).bind(**kwargs)

    def with_config(self, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """LangChain's; what is bound to the result keeps the config."""
        merged = cast("RunnableConfig", {**(config or {}), **kwargs})
        return self._bound()(bound=cast("Any", self), config=merged)

    def with_types(self, **kwargs: Any) -> Any:
        """LangChain's; what is bound to the result keeps the types."""
        return self._bound()(bound=cast("Any", self)).with_types(**kwargs)

    def with_listeners(self, **kwargs: Any) -> Any:
        """LangChain's; what is bound to the result keeps the listeners."""
        return self._bound()(bound=cast("Any", self)).with_listeners(**kwargs)

    def with_alisteners(self, **kwargs: Any) -> Any:
        """LangChain's; what is bound to the result keeps the listeners."""
        return self._bound()(bound=cast("Any", super()).with_alisteners(**kwargs))

    def with_retry(self, **kwargs: Any) -> Any:
        """LangChain's; what is bound to the result is retried too."""
        return self._bound()(bound=cast("Any", super()).with_retry(**kwargs))

    def with_fallbacks(self, fallbacks: Sequence[Runnable[Any, Any]], **kwargs: Any) -> Any:
        """LangChain's; what is bound to the result is bound to each fallback."""
        return self._bound()(bound=cast("Any", super()).with_fallbacks(fallbacks, **kwargs))


class Bound(RunnableBinding[Any, Any]):  # type: ignore[no-redef]
    """A model, or what is around it, with keywords and a config. What is bound to it keeps both; serialized, it is
    LangChain's."""

    def bind(self, **kwargs: Any) -> Runnable[Any, Any]:
        """Raises `InvalidParamsError`."""
        model: Any = self.bound
        update, rest = model._sorted(kwargs) if isinstance(model, Around) else ({}, kwargs)
        changes = {"bound": model._changed(update) if update else model, "kwargs": {**self.kwargs, **rest}}
        return self.model_copy(update=changes)

    def with_fallbacks(self, fallbacks: Sequence[Runnable[Any, Any]], **kwargs: Any) -> Any:
        """LangChain's; what is bound to the result is bound to each fallback."""
        return type(self)(bound=super().with_fallbacks(fallbacks, **kwargs))

    def with_alisteners(self, **kwargs: Any) -> Any:
        """LangChain's; what is bound to the result keeps the listeners."""
        return type(self)(bound=super().with_alisteners(**kwargs))

    @classmethod
    def lc_id(cls) -> list[str]:
        return RunnableBinding.lc_id()
