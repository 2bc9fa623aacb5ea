"""What LangChain puts around a chat model, so that tools and schemas may come on top of it.

Knows wrappers and the two methods that they pass on; knows no message.
"""

from __future__ import annotations

from collections.abc import Sequence  # noqa: TC003  (LangChain reads the annotations of public methods)
from typing import Any, cast

from langchain_core.language_models.base import LanguageModelInput  # noqa: TC002
from langchain_core.messages import AIMessage  # noqa: TC002
from langchain_core.runnables import ConfigurableField, Runnable, RunnableSerializable
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.configurable import RunnableConfigurableAlternatives, RunnableConfigurableFields

from langchain_detox_guard._around import Around, Bound
from langchain_detox_guard._fields import ModelFields
from langchain_detox_guard._structured import structured


class Choosable:
    """A chat model, or what is around one, to which alternatives may be given."""

    @classmethod
    def _bound(cls) -> type[Bound]:
        return BoundChat

    def configurable_alternatives(
        self, which: ConfigurableField, **kwargs: Any
    ) -> RunnableSerializable[LanguageModelInput, AIMessage]:
        """LangChain's; tools and schemas on top of it are bound to each alternative."""
        made: Any = cast("Any", super()).configurable_alternatives(which, **kwargs)
        return AlternativeChats(**dict(made))


class BoundChat(Choosable, Bound):  # type: ignore[no-redef]
    """A chat model, or what is around one, with keywords and a config: tools and schemas on top keep both."""

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[LanguageModelInput, AIMessage]:
        """As `ChatDetoxiGen.bind_tools`."""
        if isinstance(self.bound, ModelFields):
            return self.bind(**cast("Any", self.bound).bind_tools(tools, **kwargs).kwargs)
        return self.model_copy(update={"bound": _inside(self.bound, "bind_tools", tools, **kwargs)})

    def with_structured_output(
        self, schema: dict[str, Any] | type | None = None, **kwargs: Any
    ) -> Runnable[LanguageModelInput, Any]:
        """As `ChatDetoxiGen.with_structured_output`."""
        if isinstance(self.bound, ModelFields):
            return structured(self, schema, **kwargs)
        return self.model_copy(update={"bound": _inside(self.bound, "with_structured_output", schema, **kwargs)})


def _inside(wrapper: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    """The same wrapper around what the method makes of the model in it. (LangChain's own would lose the wrapper.)"""
    if isinstance(wrapper, RunnableBindingBase) and not isinstance(wrapper, BoundChat):
        return wrapper.model_copy(update={"bound": _inside(wrapper.bound, method, *args, **kwargs)})
    return getattr(wrapper, method)(*args, **kwargs)


class ConfigurableChat(Choosable, Around, RunnableConfigurableFields):  # type: ignore[type-arg]
    """A chat model with fields that a config sets. Serialized, it is LangChain's."""

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[LanguageModelInput, AIMessage]:
        """As `ChatDetoxiGen.bind_tools`."""
        return self.bind(**cast("Any", self.default).bind_tools(tools, **kwargs).kwargs)  # type: ignore[no-any-return]

    def with_structured_output(
        self, schema: dict[str, Any] | type | None = None, **kwargs: Any
    ) -> Runnable[LanguageModelInput, Any]:
        """As `ChatDetoxiGen.with_structured_output`."""
        return structured(self, schema, **kwargs)

    @classmethod
    def lc_id(cls) -> list[str]:
        return RunnableConfigurableFields.lc_id()


class AlternativeChats(Choosable, Around, RunnableConfigurableAlternatives):  # type: ignore[type-arg]
    """Chat models of which a config chooses. Serialized, it is LangChain's."""

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[LanguageModelInput, Any]:
        """Each binds them in its own way."""
        return self._each("bind_tools", tools, **kwargs)

    def with_structured_output(self, schema: Any = None, **kwargs: Any) -> Runnable[LanguageModelInput, Any]:
        """Each does so in its own way."""
        return self._each("with_structured_output", schema, **kwargs)

    def _each(self, method: str, *args: Any, **kwargs: Any) -> AlternativeChats:
        def on(model: Any) -> Any:
            return _inside(model, method, *args, **kwargs)

        others = {
            name: on(one) if isinstance(one, Runnable) else lambda make=one: on(make())
            for name, one in self.alternatives.items()
        }
        return self.model_copy(update={"default": on(self.default), "alternatives": others})

    @classmethod
    def lc_id(cls) -> list[str]:
        return RunnableConfigurableAlternatives.lc_id()
