"""Requests to an agent's model: whose it is, what is set in it, what is streamed. Knows requests; knows no answer."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from detox_guard import InvalidParamsError
from langchain.agents.structured_output import ToolStrategy
from langchain_core.callbacks import BaseCallbackManager
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.runnables.config import ensure_config, var_child_runnable_config

from langchain_detox_guard._inside import models_in, with_models
from langchain_detox_guard.chat import ChatDetoxiGen

if TYPE_CHECKING:
    from collections.abc import Iterator

    from langchain.agents.middleware.types import ModelRequest
    from langchain_core.runnables import RunnableConfig

_NOSTREAM = "nostream"
"""LangGraph streams no tokens of a model run with this tag; what the node returns is streamed whole."""


def with_fields(request: ModelRequest[Any], *, alpha: float | None = None, **fields: Any) -> ModelRequest[Any]:
    """The request with models that have these fields: if another middleware takes another model, they go with it.

    On the ladder (`calm_share` among the fields) an alpha is never lowered.
    """
    names = frozenset(fields) | (frozenset() if alpha is None else {"alpha"})

    def change(model: ChatDetoxiGen) -> ChatDetoxiGen:
        if alpha is None:
            return model._changed(fields)
        strength = max(alpha, model.alpha) if "calm_share" in fields else alpha
        return model._changed({**fields, "alpha": strength})

    settings = {name: value for name, value in request.model_settings.items() if name not in names}
    return request.override(model=with_models(request.model, change, names), model_settings=settings)


def check_model(model: object) -> None:
    """Raise `InvalidParamsError` where a model of ours may stand that cannot be found."""
    found = models_in(model)
    if not any(isinstance(one, ChatDetoxiGen) for one in found) and not all(
        isinstance(one, BaseChatModel) for one in found
    ):
        kinds = ", ".join(sorted({type(one).__name__ for one in found}))
        raise InvalidParamsError(
            "model", kinds, "a chat model, or one that is bound, configured, retried or has fallbacks",
            hint="DetoxMiddleware cannot find the model inside: give the model itself its alpha and guard",
        )  # fmt: skip


def all_ours(request: ModelRequest[Any]) -> bool:
    return all(isinstance(model, ChatDetoxiGen) for model in models_in(request.model))


def schemas_of(response_format: Any) -> list[dict[str, Any]]:
    """The schemas of a structured answer, as tools."""
    if response_format is None:
        return []
    specs = getattr(response_format, "schema_specs", None)
    if specs is None and (spec := getattr(response_format, "schema_spec", None)) is not None:
        specs = [spec]
    if specs is None:
        specs = ToolStrategy(getattr(response_format, "schema", response_format)).schema_specs
    return [{"type": "function", "function": {"name": one.name, "parameters": one.json_schema}} for one in specs]


@contextmanager
def held() -> Iterator[None]:
    """Nothing is streamed of what any model says in here."""
    config = ensure_config()
    quiet: RunnableConfig = {**config, "tags": [*config["tags"], _NOSTREAM]}
    # Tags that are configured around a model take the place of those above; those of the callbacks are added to them.
    if isinstance(callbacks := config.get("callbacks"), BaseCallbackManager):
        quiet["callbacks"] = tagged = callbacks.copy()
        tagged.add_tags([_NOSTREAM], inherit=True)
    token = var_child_runnable_config.set(quiet)
    try:
        yield
    finally:
        var_child_runnable_config.reset(token)
