"""What both models share: the fields, the one engine behind them, and the way from LangChain's calls to the core's.

Knows `DetoxiGen` and LangChain's base fields; knows neither prompts nor messages. Constructing a model loads nothing:
the first call asks the process-wide registry for its engine, and everyone who names the same model gets the same one.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Self, TypeVar

from detox_guard import (
    BackboneNotFoundError,
    DecodingParams,
    DetoxGuardError,
    DetoxifierNotFoundError,
    EngineBusyError,
    EngineError,
    GuardPolicy,
    InvalidParamsError,
    PromptError,
    PromptTooLongError,
    __version__,
)
from langchain_core import exceptions
from langchain_core.caches import BaseCache
from langchain_core.globals import get_llm_cache
from langchain_core.load.serializable import Serializable
from langchain_core.runnables.config import get_config_list
from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticSerializationError

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator, Sequence

    from detox_guard import DetoxiGen, Generation
    from langchain_core.language_models.base import LangSmithParams
    from langchain_core.load.serializable import SerializedConstructor, SerializedNotImplemented
    from langchain_core.runnables import RunnableConfig

_T = TypeVar("_T")
PROVIDER = "detox_guard"
_DEFAULT_MODEL = "detox-guard/default"
_LOADING = ("model", "detoxifier", "device", "dtype", "revision")
_DECODING = (
    "alpha", "calm_share", "rule", "plausibility", "temperature", "top_p", "top_k", "repetition_penalty", "seed",
    "stop",
)  # fmt: skip
_AT_ONCE = 256
"""Requests of one call under way together: well under the engine's queue, well over its batch."""


class EngineFields(Serializable):
    """The fields of `DetoxiGenLLM` and `ChatDetoxiGen`; each may also be given per call: `llm.invoke(p, alpha=3.0)`.

    `model`: hub id, folder or GGUF file; None is the embedded default. `detoxifier`: hub id or folder; None is the one
    we ship, for the embedded default only. `engine`: a `DetoxiGen` of your own instead of the shared one; it is never
    serialized, cached under its own name, and cannot be pickled.
    The rest is `detox_guard.DecodingParams`; `max_tokens` is its `max_new_tokens`. Unknown names are errors.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", protected_namespaces=())

    model: str | None = None
    detoxifier: str | None = None
    device: str | None = None
    dtype: str | None = None
    revision: str | None = None

    alpha: float = 3.0
    calm_share: float = 1 / 6
    rule: str = "bounded"
    plausibility: float = 0.0
    temperature: float = 1.0
    top_p: float = 0.9
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_tokens: int = 256
    seed: int | None = None
    stop: list[str] | None = None
    guard: GuardPolicy | None = None
    """Text is scored unit by unit before it is released."""
    streaming: bool = False
    """`invoke` streams to the callbacks."""

    cache: BaseCache | bool | None = Field(default=None, exclude=True)
    """As in LangChain, except that sampling without a seed is not cached unless asked for (`True` or a cache), and that
    no reply is whose guard has a scorer object of your own: the cache could not tell it from another."""
    engine: Any = Field(default=None, exclude=True, repr=False)

    @model_validator(mode="after")
    def _check_decoding(self) -> Self:
        """Bounds are the core's; better met here than at the first call."""
        self._decoding_params()
        if self.engine is not None and (named := [name for name in _LOADING if getattr(self, name) is not None]):
            raise InvalidParamsError(
                "engine", "your own", f"not together with {', '.join(named)}, which it has its own of"
            )
        return self

    # -- the engine and what it is asked for

    def _engine(self) -> DetoxiGen:
        if self.engine is not None:
            return self.engine  # type: ignore[no-any-return]
        from detox_guard import DetoxiGen  # brings torch

        names: dict[str, Any] = {name: getattr(self, name) for name in _LOADING}
        return DetoxiGen.shared(names.pop("model"), **names)

    async def _aengine(self) -> DetoxiGen:
        return self.engine if self.engine is not None else await asyncio.to_thread(self._engine)

    def _with(self, kwargs: dict[str, Any]) -> tuple[Self, dict[str, Any]]:
        """A copy with the keywords that name a field; the other keywords. Caches and traces then see what will run."""
        settable = EngineFields.model_fields.keys() - {"engine"}
        update = {name: value for name, value in kwargs.items() if name in settable}
        rest = {name: value for name, value in kwargs.items() if name not in settable}
        if not update.keys().isdisjoint(_LOADING):
            update["engine"] = None  # this call wants another
        copy = self.model_copy(update=update)
        copy.__dict__.pop("_serialized", None)  # a cached property of the base, which would be the original's
        drawn = copy.cache is None and copy.temperature > 0 and copy.seed is None
        if drawn or (copy._guard is not None and not isinstance(copy._guard.scorer, str)):
            copy.cache = False
        return copy, rest

    @property
    def _guard(self) -> GuardPolicy | None:
        """The guard in force: this model's, else that of an engine of its own."""
        own: GuardPolicy | None = self.guard or (self.engine.params.guard if self.engine is not None else None)
        return own

    def _decoding_params(self, stop: str | Sequence[str] | None = None, **extra: Any) -> DecodingParams:
        """`stop` of this call, which may be one string, else the model's own: a grammar sets those aside."""
        if self.guard is not None:
            extra["guard"] = self.guard
        values = {name: getattr(self, name) for name in _DECODING}
        if stop is not None:
            values["stop"] = [stop] if isinstance(stop, str) else list(stop)
        elif extra.get("grammar") is not None:  # it says itself where the reply ends
            values["stop"] = None
        return DecodingParams(**values, max_new_tokens=self.max_tokens, **extra)

    # -- identity: caches, traces, serialization

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """What decides the text. Names as given until there is an engine, then of what it loaded; never weights."""
        names: dict[str, Any] = {name: getattr(self, name) for name in _LOADING}
        names["model"] = self._model_name
        if self.engine is not None:
            names["detoxifier"] = list(self.engine.detoxifier_ids)
        params = self._decoding_params().replace(guard=self._guard)
        shown = params.model_dump(mode="json", exclude={"trace"}, fallback=_name_of)
        return {**names, **shown, "version": __version__}

    @property
    def _model_name(self) -> str:
        return str(self.engine.model_id) if self.engine is not None else self.model or _DEFAULT_MODEL

    def _caches(self) -> bool:
        return self.cache is not False and (self.cache is not None or get_llm_cache() is not None)

    def _ls(self, params: LangSmithParams, stop: list[str] | None, kwargs: dict[str, Any]) -> LangSmithParams:
        """LangSmith's standard parameters, with the overrides of this call."""
        own, _ = self._with(kwargs)
        params["ls_provider"] = PROVIDER
        params["ls_model_name"] = own._model_name
        params["ls_temperature"] = own.temperature
        params["ls_max_tokens"] = own.max_tokens
        if stop := stop if stop is not None else own.stop:
            params["ls_stop"] = [stop] if isinstance(stop, str) else stop
        return params

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return True

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        return ["langchain_detox_guard", cls.__module__.rpartition(".")[2]]

    def to_json(self) -> SerializedConstructor | SerializedNotImplemented:
        """Names and numbers. With an engine or a scorer of your own: not serializable (its name would load another)."""
        out = super().to_json()
        if self.engine is not None or out["type"] != "constructor":
            return self.to_json_not_implemented()
        if self.guard is not None:
            try:
                out["kwargs"]["guard"] = self.guard.model_dump(mode="json", exclude_defaults=True)
            except PydanticSerializationError:
                return self.to_json_not_implemented()
        return out

    def __getstate__(self) -> dict[Any, Any]:
        if self.engine is not None:
            raise TypeError("a model with an engine of its own cannot be pickled: name the model instead")
        return super().__getstate__()


def generation_info(engine: DetoxiGen, generation: Generation) -> dict[str, Any]:
    """What LangChain's metadata says of one reply: small and JSON-able, the same for both models."""
    return {
        "finish_reason": generation.finish_reason,
        "model_name": engine.model_id,
        "model_provider": PROVIDER,
        "detox": generation.summary(),
    }


def wide(config: RunnableConfig | Sequence[RunnableConfig] | None, count: int) -> list[RunnableConfig]:
    """One config each, whose threads are as many as the requests: they only wait, and the engine batches them."""
    configs = get_config_list(config, count)
    if configs and configs[0].get("max_concurrency") is None:
        configs[0]["max_concurrency"] = min(count, _AT_ONCE)
    return configs


async def gather(work: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """All results, in order, a bounded number at a time. The first error, or a cancellation, cancels the rest."""
    seats = asyncio.Semaphore(_AT_ONCE)

    async def seated(one: Coroutine[Any, Any, _T]) -> _T:
        async with seats:
            return await one

    tasks = [asyncio.create_task(seated(one)) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _name_of(value: object) -> str:
    """A scorer or a callback, in a cache key."""
    return str(getattr(value, "name", None) or getattr(value, "__qualname__", type(value).__qualname__))


# -- errors: ours stay ours, and are LangChain's too

_THEIRS: tuple[tuple[type[DetoxGuardError], str], ...] = (
    (PromptTooLongError, "ContextOverflowError"),
    (InvalidParamsError, "ModelInvalidRequestError"),
    (PromptError, "ModelInvalidRequestError"),
    (BackboneNotFoundError, "ModelNotFoundError"),
    (DetoxifierNotFoundError, "ModelNotFoundError"),
    (EngineBusyError, "ModelRateLimitError"),
    (EngineError, "ModelError"),
)


@contextmanager
def langchain_errors() -> Iterator[None]:
    """Raise the core's errors so that `except ContextOverflowError` (or our own class) catches them."""
    try:
        yield
    except DetoxGuardError as error:
        raise as_langchain(error) from error


def as_langchain(error: DetoxGuardError) -> DetoxGuardError:
    """The same error, also of LangChain's class for it where this langchain-core has one."""
    for ours, name in _THEIRS:
        theirs = getattr(exceptions, name, None)  # some came late in 1.x
        if isinstance(error, ours) and theirs is not None:
            both = _both(type(error), theirs)  # type: ignore[arg-type]
            twin: DetoxGuardError = both.__new__(both)
            twin.args = error.args
            twin.__dict__.update(error.__dict__)
            return twin
    return error


@cache
def _both(ours: type[Any], theirs: type[Any]) -> Any:
    return ours if issubclass(ours, theirs) else type(ours.__name__, (ours, theirs), {"__module__": ours.__module__})
