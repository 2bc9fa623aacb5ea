"""The base of what users configure here: nothing that was set is lost. Knows pydantic and pickle; knows no model."""

from __future__ import annotations

import pickle
from collections.abc import Mapping  # noqa: TC003
from copy import deepcopy
from typing import Any, ClassVar, Self

from detox_guard import InvalidParamsError, NotPicklableError
from langchain_core.load.serializable import Serializable
from pydantic import ValidationError


class Settings(Serializable):
    """Checked where it is made and where it is copied (`InvalidParamsError` names the field).

    A deep copy shares the objects of this process: models, scorers, caches, callbacks. Pickling keeps every field or
    raises `NotPicklableError`.
    """

    _shared: ClassVar[tuple[str, ...]] = ()
    """Fields that hold objects of this process."""

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise named(error) from None

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some fields changed, each change checked as the constructor does."""
        if not update:
            return super().model_copy(deep=deep)
        return (deepcopy(self) if deep else self)._changed(update)

    def _changed(self, update: Mapping[str, Any]) -> Self:
        """Made again of the fields that were set, as they are now, with some changed: all are checked."""
        given = {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}
        copy = type(self).__new__(type(self))
        try:  # a subclass's own `__init__` may want other arguments, or set its own values again
            type(self).__pydantic_validator__.validate_python({**given, **update}, self_instance=copy)
        except ValidationError as error:
            raise named(error) from None
        for name, value in (self.__pydantic_private__ or {}).items():
            setattr(copy, name, value)
        return copy

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        memo = {} if memo is None else memo
        for name in self._shared:
            value = getattr(self, name, None)
            for one in value if isinstance(value, list) else [value]:
                if one is not None:
                    memo[id(one)] = one
        return super().__deepcopy__(memo)

    def __getstate__(self) -> dict[Any, Any]:
        """Raises `NotPicklableError` for what belongs to this process."""
        for name, value in self:
            try:
                pickle.dumps(value)
            except NotPicklableError:
                raise
            except Exception as error:
                raise NotPicklableError(
                    f"{name}: {type(value).__name__} cannot be pickled: {error}", hint="build it over there"
                ) from error
        return super().__getstate__()


def refuse_scorer(scorer: object) -> None:
    """Raise `NotPicklableError` for a scorer object: it belongs to its process."""
    if scorer is not None and not isinstance(scorer, str):
        name = getattr(scorer, "name", type(scorer).__name__)
        raise NotPicklableError(f"scorer: {name!r} is an object of this process", hint="name a scorer instead")


def named(error: ValidationError) -> InvalidParamsError:
    """The first complaint of a pydantic error, as ours."""
    first = error.errors(include_url=False)[0]
    inner = first.get("ctx", {}).get("error")
    if not isinstance(inner, InvalidParamsError):
        return InvalidParamsError.from_pydantic(error)
    field = ".".join([*(str(part) for part in first["loc"]), inner.field])
    return InvalidParamsError(field, inner.value, inner.bound, hint=inner.hint)


def no_bool(value: object) -> object:
    """For a validator of numbers, which pydantic makes of True and False too."""
    if isinstance(value, bool):
        raise ValueError("Input should be a number, not a bool")
    return value
