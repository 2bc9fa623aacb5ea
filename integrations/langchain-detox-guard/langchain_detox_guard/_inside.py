"""The chat models inside what LangChain wraps around them. Knows its wrappers; knows no request and no answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain_core.runnables import Runnable, RunnableSequence, RunnableWithFallbacks
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.configurable import RunnableConfigurableAlternatives, RunnableConfigurableFields

from langchain_detox_guard.chat import ChatDetoxiGen

if TYPE_CHECKING:
    from collections.abc import Callable


def models_in(runnable: object) -> list[object]:
    """What is at the bottom: chat models, and whatever else this cannot look into."""
    return [model for part in _parts(runnable) for model in models_in(part)] if _parts(runnable) else [runnable]


def with_models(runnable: Any, change: Callable[[ChatDetoxiGen], ChatDetoxiGen], fields: frozenset[str]) -> Any:
    """The same wrappers around changed models of ours. What is bound or configurable outside of a model no longer sets
    `fields`: it would undo the change."""

    def within(part: Any) -> Any:
        return with_models(part, change, fields)

    def without(values: Any) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name not in fields}

    if isinstance(runnable, ChatDetoxiGen):
        return change(runnable)
    if isinstance(runnable, RunnableBindingBase):
        kwargs = dict(runnable.kwargs)

        def told(model: ChatDetoxiGen) -> ChatDetoxiGen:  # what is bound comes before the change, at any depth
            return change(model._changed(model._sorted(kwargs)[0]))

        bound = with_models(runnable.bound, told, fields)
        if isinstance(bound, ChatDetoxiGen):  # tools that are bound next would lose them
            kwargs = bound._sorted(kwargs)[1]
        return runnable.model_copy(update={"bound": bound, "kwargs": without(kwargs)})
    if isinstance(runnable, RunnableWithFallbacks):
        return runnable.model_copy(
            update={"runnable": within(runnable.runnable), "fallbacks": [within(one) for one in runnable.fallbacks]}
        )
    if isinstance(runnable, RunnableSequence):
        return runnable.model_copy(
            update={
                "first": within(runnable.first),
                "middle": [within(one) for one in runnable.middle],
                "last": within(runnable.last),
            }
        )
    if isinstance(runnable, RunnableConfigurableFields):
        return runnable.model_copy(update={"default": within(runnable.default), "fields": without(runnable.fields)})
    if isinstance(runnable, RunnableConfigurableAlternatives):
        others = {name: within(_made(one)) for name, one in runnable.alternatives.items()}
        return runnable.model_copy(update={"default": within(runnable.default), "alternatives": others})
    return runnable


def _parts(runnable: object) -> list[Any]:
    if isinstance(runnable, RunnableBindingBase):
        return [runnable.bound]
    if isinstance(runnable, RunnableWithFallbacks):
        return [runnable.runnable, *runnable.fallbacks]
    if isinstance(runnable, RunnableSequence):
        return list(runnable.steps)
    if isinstance(runnable, RunnableConfigurableFields):
        return [runnable.default]
    if isinstance(runnable, RunnableConfigurableAlternatives):
        return [runnable.default, *(_made(one) for one in runnable.alternatives.values())]
    return []


def _made(alternative: Runnable[Any, Any] | Callable[[], Runnable[Any, Any]]) -> Runnable[Any, Any]:
    """An alternative, which may come as a function that makes it."""
    return alternative if isinstance(alternative, Runnable) else alternative()
