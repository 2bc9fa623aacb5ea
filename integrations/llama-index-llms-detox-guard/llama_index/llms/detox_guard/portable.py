"""Components that keep their configuration on every way out: copies, pickles, dicts, events, cache keys.

Knows LlamaIndex's base component, which drops what cannot be pickled; knows no LLM and no guard.
"""

from __future__ import annotations

import pickle
import sys
import uuid
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

from llama_index.core.bridge.pydantic import (
    BaseModel,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)
from llama_index.core.callbacks import CallbackManager
from llama_index.core.schema import BaseComponent

from detox_guard import InvalidParamsError, NotPicklableError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Portable", "as_json", "refuse_stand_ins"]

_OBJECT = "process_object"
"""Key of a dict that stands for an object of this process."""
_OF_THE_PROCESS = ("callback_manager", "rate_limiter")
"""Fields that decide nothing about the text."""


class Portable(BaseComponent):
    """A component that goes elsewhere whole, or not at all.

    A deep copy shares the objects of this process: model, scorer, callbacks. Pickling them raises
    `NotPicklableError`; callbacks alone stay behind. A dict (and so an event and a cache key) is JSON-able and says
    which object it was; a component is not made of such a dict again (`NotPicklableError`), unless `from_dict` is
    given an object in its place.
    """

    own: ClassVar[tuple[str, ...]] = ()
    """Fields that may hold an object of this process instead of a name."""

    def __init__(self, **data: Any) -> None:
        refuse_stand_ins(type(self).__name__, data)
        for name in data:
            if name not in type(self).model_fields:
                raise InvalidParamsError(name, data[name], f"no field of {type(self).__name__}")
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise InvalidParamsError.from_pydantic(error) from None

    def in_force(self) -> dict[str, Any]:
        """What decides about its outputs here and now without being part of it, as JSON; told in dicts."""
        return {}

    def __getstate__(self) -> dict[Any, Any]:
        state: dict[Any, Any] = BaseModel.__getstate__(self)
        if _only_asked_whether():
            return {}
        fields = dict(state["__dict__"])
        for name, value in [*fields.items(), *(state.get("__pydantic_private__") or {}).items()]:
            if name in self.own and not isinstance(value, str | None):
                raise NotPicklableError(
                    f"{name}: {_called(value)} belongs to its process", hint="name it, and load it over there"
                )
            try:
                pickle.dumps(value)
            except NotPicklableError:
                raise
            except Exception as error:
                if name != "callback_manager":
                    raise NotPicklableError(f"{name}: {_called(value)} cannot be pickled: {error}") from error
                del fields[name]
        return {**state, "__dict__": fields}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        fields = {"callback_manager": CallbackManager([]), **state["__dict__"]}
        BaseModel.__setstate__(self, {**state, "__dict__": fields})

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        memo = {} if memo is None else memo
        for name in (*self.own, *_OF_THE_PROCESS):
            value = getattr(self, name, None)
            memo[id(value)] = value
        return super().__deepcopy__(memo)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some fields changed; each change is checked. Raises `InvalidParamsError`."""
        copy = super().model_copy(deep=deep)
        for name, value in (update or {}).items():
            if name not in type(self).model_fields:
                raise InvalidParamsError(name, value, f"no field of {type(self).__name__}")
            try:
                copy.__pydantic_validator__.validate_assignment(copy, name, value)
            except ValidationError as error:
                raise InvalidParamsError.from_pydantic(error) from None
        return copy

    @model_serializer(mode="wrap")
    def custom_model_dump(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        for name, field in type(self).model_fields.items():
            value = getattr(self, name, None)
            if not field.exclude or name in _OF_THE_PROCESS or value is None or _is_upstreams(value):
                continue
            data[name] = _stand_in(value)
        data.update(self.in_force())
        data["class_name"] = self.class_name()
        return data


def as_json(value: object) -> Any:
    """JSON for any value; an object that is none of JSON's becomes a dict that tells it from all others."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, BaseModel):
        return {name: as_json(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, dict):
        return {str(key): as_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [as_json(part) for part in value]
    return _stand_in(value)


def _stand_in(value: Any) -> dict[str, Any]:
    """What stands for an object: its name, and what makes its outputs what they are."""
    identity = getattr(getattr(value, "backbone", None), "identity", None)
    if isinstance(identity, dict):  # a DetoxiGen
        about = {**identity, "detoxifiers": list(value.detoxifier_ids), "params": as_json(value.params)}
        return {_OBJECT: _path(type(value)), **about}
    if _is_importable(value):
        return {_OBJECT: _path(value)}
    name = getattr(value, "name", None) or getattr(value, "model_id", None) or getattr(value, "__qualname__", None)
    named = {"name": name} if isinstance(name, str) else {}
    return {_OBJECT: _path(type(value)), **named, "id": _id_of(value)}


def refuse_stand_ins(path: str, value: object) -> None:
    """Raises `NotPicklableError` for a dict that stands for an object of the process that wrote it."""
    if isinstance(value, dict):
        if isinstance(value.get(_OBJECT), str):
            raise NotPicklableError(
                f"{path}: {value.get('name') or value[_OBJECT]} was an object of the process that wrote this",
                hint="give from_dict the object in its place, by the name of its field",
            )
        for key, part in value.items():
            refuse_stand_ins(f"{path}.{key}", part)
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            refuse_stand_ins(f"{path}[{i}]", part)


def _only_asked_whether() -> bool:
    """LlamaIndex's base component tries whether a part can be pickled, and drops it if not. The part says yes then,
    and refuses when the whole is pickled in earnest."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is BaseComponent.__getstate__.__code__:
            return True
    return False


def _called(value: object) -> str:
    return f"{getattr(value, 'name', None) or type(value).__name__!r}"


def _path(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _is_importable(value: Any) -> bool:
    """A function or class that its name finds."""
    found: Any = sys.modules.get(getattr(value, "__module__", None) or "")
    for part in getattr(value, "__qualname__", "").split("."):
        found = getattr(found, part, None)
    return found is value


def _is_upstreams(value: Any) -> bool:
    """LlamaIndex's own default function."""
    return str(getattr(value, "__module__", "")).startswith("llama_index.core.") and _is_importable(value)


_ids: dict[int, tuple[Callable[[], object], str]] = {}


def _id_of(value: object) -> str:
    """Another one for every object, as long as there is one: an address may be used again."""
    known = _ids.get(id(value))
    if known is None or known[0]() is not value:
        address = id(value)
        there: Callable[[], object]
        try:
            there = weakref.ref(value, lambda _: _ids.pop(address, None))
        except TypeError:  # kept for ever, so that nothing else gets its address
            there = partial(_itself, value)
        known = _ids[id(value)] = (there, uuid.uuid4().hex[:12])
    return known[1]


def _itself(value: object) -> object:
    return value
