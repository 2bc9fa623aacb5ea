"""What both models share: the fields, the one engine behind them, and the way from LangChain's calls to the core's.

Knows `DetoxiGen` and LangChain's base fields; knows neither prompts nor messages. Constructing a model loads nothing:
the first call asks the process-wide registry for its engine, and everyone who names the same model gets the same one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import threading
from collections.abc import Iterator  # noqa: TC003  (LangChain reads the annotations of public methods)
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast
from uuid import uuid4
from weakref import WeakKeyDictionary

from detox_guard import DecodingParams, GuardPolicy, InvalidParamsError, NotPicklableError, __version__
from langchain_core.caches import BaseCache
from langchain_core.globals import get_llm_cache
from langchain_core.load.serializable import SerializedConstructor, SerializedNotImplemented  # noqa: TC002
from langchain_core.runnables import Runnable, RunnableConfig  # noqa: TC002
from langchain_core.runnables.base import RunnableBinding
from pydantic import ConfigDict, Field, PrivateAttr, field_validator, model_validator
from pydantic_core import PydanticSerializationError

from langchain_detox_guard._errors import as_langchain as as_langchain
from langchain_detox_guard._loading import LOADING, LoadFields
from langchain_detox_guard._threads import AT_ONCE, each

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from detox_guard import DetoxiGen, Generation
    from langchain_core.language_models.base import LangSmithParams

_T = TypeVar("_T")
PROVIDER = "detox_guard"
_DEFAULT_MODEL = "detox-guard/default"
_DECODING = (
    "alpha", "calm_share", "rule", "plausibility", "temperature", "top_p", "top_k", "repetition_penalty", "seed",
    "stop",
)  # fmt: skip


_NUMBERS = (
    "alpha", "calm_share", "plausibility", "temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed",
)  # fmt: skip


class Around:
    """What LangChain puts around a model, or around what is around one: whatever comes on top keeps it."""

    @classmethod
    def _bound(cls) -> type[Bound]:
        return Bound

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


class EngineFields(Around, LoadFields):
    """The fields of `DetoxiGenLLM` and `ChatDetoxiGen`; each may also be given per call: `llm.invoke(p, alpha=3.0)`.

    `model`: hub id, folder, LoRA adapter or GGUF file; None is the embedded default. How it is loaded is said as in
    `detox_guard.LoadOptions` (`device_map="auto"`, `quantization_config="int8"`, …). `detoxifier`: hub id or folder;
    None is the one we ship, for the embedded default only. `engine`: a `DetoxiGen` of your own instead of the shared one; deep copies
    share it, no cache takes it for another of its name, and it is neither serialized nor pickled (`NotPicklableError`).
    The rest is `detox_guard.DecodingParams`; `max_tokens` is its `max_new_tokens`. A bad value or an unknown name is
    `InvalidParamsError` with its field: in the constructor, in a call, in `bind` and in `model_copy(update=...)`.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", protected_namespaces=())

    model: str | None = None
    detoxifier: str | None = None

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

    _shared: ClassVar = ("engine", "cache", "callbacks", "rate_limiter", "custom_get_token_ids")
    _own_settable: ClassVar[frozenset[str]] = frozenset()
    """Fields of the class itself that a call may set too."""
    _loaded: Any = PrivateAttr(default=None)
    """The engine behind the names, where a cache is about to be asked."""

    cache: BaseCache | bool | None = Field(default=None, exclude=True)
    """As in LangChain, except that sampling without a seed is not cached unless asked for (`True` or a cache), and that
    no reply is whose guard has a scorer object of your own: the cache could not tell it from another."""
    engine: Any = Field(default=None, repr=False)

    @field_validator(*_NUMBERS, mode="before")
    @classmethod
    def _no_bool(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError("Input should be a number, not a bool")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_decoding(self) -> Self:
        """Bounds are the core's; better met here than at the first call."""
        try:
            self._decoding_params()
        except InvalidParamsError as error:
            if error.field.startswith("max_new_tokens"):
                raise InvalidParamsError("max_tokens", error.value, error.bound, hint=error.hint) from None
            raise
        self._loading()
        if self.engine is not None and (named := [name for name in LOADING if getattr(self, name) not in (None, False)]):
            raise InvalidParamsError(
                "engine", "your own", f"not together with {', '.join(named)}, which it has its own of"
            )
        return self

    # -- the engine and what it is asked for

    def _engine(self) -> DetoxiGen:
        if self.engine is not None:
            return self.engine  # type: ignore[no-any-return]
        from detox_guard import DetoxiGen  # brings torch

        return DetoxiGen.shared(self.model, detoxifier=self.detoxifier, **self._loading())

    async def _aengine(self) -> DetoxiGen:
        return self.engine if self.engine is not None else await asyncio.to_thread(self._engine)

    def _with(self, kwargs: dict[str, Any]) -> tuple[Self, dict[str, Any]]:
        """A copy with the keywords that name a field; the other keywords. Caches and traces then see what will run."""
        update, rest = self._sorted(kwargs)
        copy = self._changed(update)
        copy._loaded = None
        drawn = copy.cache is None and copy.temperature > 0 and copy.seed is None
        if drawn or (copy._guard is not None and not isinstance(copy._guard.scorer, str)):
            copy.cache = False
        return copy, rest

    def _sorted(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The keywords that set a field, and the others."""
        settable = self._settable()
        update = {name: value for name, value in kwargs.items() if name in settable}
        if not update.keys().isdisjoint(LOADING):
            update["engine"] = None  # this call wants another
        return update, {name: value for name, value in kwargs.items() if name not in settable}

    @classmethod
    def _settable(cls) -> frozenset[str]:
        return frozenset(EngineFields.model_fields.keys() - {"engine"}) | cls._own_settable

    # -- batches of threads

    def batch_as_completed(  # type: ignore[no-untyped-def]
        self, inputs, config=None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> Iterator[tuple[int, Any]]:
        """Each reply with its place, as they come. Ctrl-C, an error and leaving the loop cancel the rest."""

        def ask(value: Any, own: RunnableConfig) -> Any:
            return cast("Runnable[Any, Any]", self).invoke(value, own, **kwargs)

        yield from each(ask, inputs, config, return_exceptions=return_exceptions)

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
            values["stop"] = stop
        elif extra.get("grammar") is not None:  # it says itself where the reply ends
            values["stop"] = None
        return DecodingParams(**values, max_new_tokens=self.max_tokens, **extra)

    # -- identity: caches, traces, serialization

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """What decides the text. Names as given until there is an engine, then of what it loaded; never weights."""
        names: dict[str, Any] = {"model": self._model_name, "detoxifier": self.detoxifier, **self._loading()}
        names.pop("token", None)
        if self.engine is not None:  # another of its name may hold other weights
            names["engine"] = _identity_of(self.engine)
        elif self.model is not None and os.path.exists(self.model):
            names["model"] = os.path.realpath(self.model)
        if (engine := self.engine or self._loaded) is not None:
            names["detoxifier"] = list(engine.detoxifier_ids)
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
        """Raises `NotPicklableError`."""
        if self.engine is not None:
            raise NotPicklableError(
                "engine: an engine of your own belongs to its process", hint="name the model, and load it over there"
            )
        return super().__getstate__()


class Bound(RunnableBinding[Any, Any]):  # type: ignore[no-redef]
    """A model, or what is around it, with keywords and a config. What is bound to it keeps both; serialized, it is
    LangChain's."""

    def bind(self, **kwargs: Any) -> Runnable[Any, Any]:
        """Raises `InvalidParamsError`."""
        model: Any = self.bound
        update, rest = model._sorted(kwargs) if isinstance(model, EngineFields) else ({}, kwargs)
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


def generation_info(engine: DetoxiGen, generation: Generation, guard: GuardPolicy | None = None) -> dict[str, Any]:
    """What LangChain's metadata says of one reply: small and JSON-able, the same for both models. `guard` is the one in
    force, where someone may ask for it."""
    told = generation.summary()
    if guard is not None:
        told["policy"] = policy_mark(guard)
    return {
        "finish_reason": generation.finish_reason,
        "model_name": engine.model_id,
        "model_provider": PROVIDER,
        "detox": told,
    }


def policy_mark(guard: GuardPolicy) -> str:
    """The same for policies that release the same text: a scorer's name alone does not tell."""
    told = guard.model_dump(mode="json", exclude={"scorer", "on_event", "audit_log", "keep_discarded"})
    scorer = guard.scorer
    told["scorer"] = scorer if isinstance(scorer, str) else f"{_name_of(scorer)} at {id(scorer)}"
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


async def gather(work: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """All results, in order, a bounded number at a time. The first error, or a cancellation, cancels the rest."""
    seats = asyncio.Semaphore(AT_ONCE)

    async def seated(one: Coroutine[Any, Any, _T]) -> _T:
        async with seats:
            return await one

    tasks = [asyncio.create_task(seated(one)) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


_identities: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
_identities_lock = threading.Lock()


def _identity_of(engine: object) -> str:
    """A name that no other engine has, in this process or another: a cache key."""
    with _identities_lock:
        return _identities.setdefault(engine, uuid4().hex)


def _name_of(value: object) -> str:
    """A scorer or a callback, in a cache key."""
    return str(getattr(value, "name", None) or getattr(value, "__qualname__", type(value).__qualname__))
