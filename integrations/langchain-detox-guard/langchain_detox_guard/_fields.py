"""What both models share: the fields, and the way from LangChain's keywords to the core's parameters.

Knows `DetoxiGen` and LangChain's base fields; knows neither prompts nor messages. Constructing a model loads nothing:
the first call asks the process-wide registry, and everyone who names the same model gets the same one.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator  # noqa: TC003  (LangChain reads the annotations of public methods)
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from detox_guard import DecodingParams, GuardPolicy, InvalidParamsError, NotPicklableError, __version__, field_of
from langchain_core.caches import BaseCache
from langchain_core.globals import get_llm_cache
from langchain_core.load.serializable import SerializedConstructor, SerializedNotImplemented  # noqa: TC002
from langchain_core.runnables import Runnable, RunnableConfig  # noqa: TC002
from pydantic import ConfigDict, Field, PrivateAttr, field_validator, model_validator
from pydantic_core import PydanticSerializationError

from langchain_detox_guard._around import Around
from langchain_detox_guard._identity import PROVIDER, identity_of, name_of
from langchain_detox_guard._loading import LOADING, LoadFields
from langchain_detox_guard._settings import no_bool
from langchain_detox_guard._threads import each

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard import DetoxiGen
    from langchain_core.language_models.base import LangSmithParams

_DEFAULT_MODEL = "detox-guard/default"
_DECODING = (
    "alpha", "calm_share", "rule", "plausibility", "temperature", "top_p", "top_k", "repetition_penalty", "seed",
    "stop",
)  # fmt: skip
_NUMBERS = (
    "alpha", "calm_share", "plausibility", "temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed",
)  # fmt: skip


class ModelFields(Around, LoadFields):
    """The fields of `DetoxiGenLLM` and `ChatDetoxiGen`; each may also be given per call: `llm.invoke(p, alpha=3.0)`.

    How a model is loaded is said as in `detox_guard.LoadOptions`: `device_map="auto"`, `quantization_config="int8"`,
    `engine="llamacpp"` with `n_ctx`, `n_gpu_layers` and the like.
    Those of `detox_guard.DecodingParams` mean what they mean there; `max_tokens` is its `max_new_tokens`. A bad value
    or an unknown name is `InvalidParamsError` with its field: in the constructor, in a call, in `bind` and in
    `model_copy(update=...)`. Deep copies share a `detoxigen`, and no cache takes it for another of its name. It is
    neither serialized nor pickled (`NotPicklableError`).
    """

    model_config = ConfigDict(
        arbitrary_types_allowed=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True
    )

    model: str | None = None
    """Hub id, folder, LoRA adapter or GGUF file; None is the embedded default."""
    detoxifier: str | None = None
    """Hub id or folder; None is "auto": the one we ship for the embedded default, else one trained here for your model,
    else texts that need no training."""

    alpha: float = field_of(DecodingParams, "alpha")
    calm_share: float = field_of(DecodingParams, "calm_share")
    rule: str = field_of(DecodingParams, "rule")
    plausibility: float = field_of(DecodingParams, "plausibility")
    temperature: float = field_of(DecodingParams, "temperature")
    top_p: float = field_of(DecodingParams, "top_p")
    top_k: int = field_of(DecodingParams, "top_k")
    repetition_penalty: float = field_of(DecodingParams, "repetition_penalty")
    max_tokens: int = field_of(DecodingParams, "max_new_tokens")
    seed: int | None = field_of(DecodingParams, "seed")
    stop: list[str] | None = field_of(DecodingParams, "stop", default=None)
    guard: GuardPolicy | None = field_of(DecodingParams, "guard")
    streaming: bool = False
    """`invoke` streams to the callbacks."""

    _shared: ClassVar = ("detoxigen", "cache", "callbacks", "rate_limiter", "custom_get_token_ids")
    _own_settable: ClassVar[frozenset[str]] = frozenset()
    """Fields of the class itself that a call may set too."""
    _loaded: Any = PrivateAttr(default=None)
    """The model behind the names, where a cache is about to be asked."""

    cache: BaseCache | bool | None = Field(default=None, exclude=True)
    """As in LangChain, except that sampling without a seed is not cached unless asked for (`True` or a cache), and that
    no reply is whose guard has a scorer object of your own: the cache could not tell it from another."""
    detoxigen: Any = Field(default=None, repr=False)
    """A `DetoxiGen` of your own, instead of the names above."""

    _numbers = field_validator(*_NUMBERS, mode="before")(no_bool)

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _object_named_engine(cls, data: Any) -> Any:
        """`engine=` used to be the name of `detoxigen`; an object still goes there."""
        if isinstance(data, dict) and not isinstance(data.get("engine"), str | None) and "detoxigen" not in data:
            data = {**data, "detoxigen": data["engine"], "engine": None}
        return data

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
        named = [name for name in LOADING if getattr(self, name) not in (None, False)]
        if self.detoxigen is not None and named:
            raise InvalidParamsError(
                "detoxigen", "your own", f"not together with {', '.join(named)}, which it has its own of"
            )
        return self

    # -- the model behind it, and what it is asked for

    def _detoxigen(self) -> DetoxiGen:
        if self.detoxigen is not None:
            return self.detoxigen  # type: ignore[no-any-return]
        from detox_guard import DetoxiGen  # brings torch

        return DetoxiGen.shared(self.model, detoxifier=self.detoxifier, **self._loading())

    async def _adetoxigen(self) -> DetoxiGen:
        return self.detoxigen if self.detoxigen is not None else await asyncio.to_thread(self._detoxigen)

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
            update["detoxigen"] = None  # this call wants another
        return update, {name: value for name, value in kwargs.items() if name not in settable}

    @classmethod
    def _settable(cls) -> frozenset[str]:
        return frozenset(ModelFields.model_fields.keys() - {"detoxigen"}) | cls._own_settable

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
        """The guard in force: this model's, else that of a `detoxigen` of its own."""
        own: GuardPolicy | None = self.guard or (self.detoxigen.params.guard if self.detoxigen is not None else None)
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
        """What decides the text. Never weights.

        Names stand as they were given until something is loaded, then as it calls itself.
        """
        names: dict[str, Any] = {"model": self._model_name, "detoxifier": self.detoxifier, **self._loading()}
        names.pop("token", None)
        if self.detoxigen is not None:  # another of its name may hold other weights
            names["detoxigen"] = identity_of(self.detoxigen)
        elif self.model is not None and os.path.exists(self.model):
            names["model"] = os.path.realpath(self.model)
        if (detoxigen := self.detoxigen or self._loaded) is not None:
            names["detoxifier"] = list(detoxigen.detoxifier_ids)
        params = self._decoding_params().replace(guard=self._guard)
        shown = params.model_dump(mode="json", exclude={"trace"}, fallback=name_of)
        return {**names, **shown, "version": __version__}

    @property
    def _model_name(self) -> str:
        return str(self.detoxigen.model_id) if self.detoxigen is not None else self.model or _DEFAULT_MODEL

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
        """Names and numbers. A `detoxigen` or a scorer of your own is not serializable: its name would load another."""
        out = super().to_json()
        if self.detoxigen is not None or out["type"] != "constructor":
            return self.to_json_not_implemented()
        if self.guard is not None:
            try:
                out["kwargs"]["guard"] = self.guard.model_dump(mode="json", exclude_defaults=True)
            except PydanticSerializationError:
                return self.to_json_not_implemented()
        return out

    def __getstate__(self) -> dict[Any, Any]:
        """Raises `NotPicklableError`."""
        if self.detoxigen is not None:
            raise NotPicklableError(
                "detoxigen: a model of your own belongs to its process", hint="name the model, and load it over there"
            )
        return super().__getstate__()
