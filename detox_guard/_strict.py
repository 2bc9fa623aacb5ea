"""The base of everything a caller may set. Knows pydantic; knows no setting."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema

from detox_guard.errors import InvalidParamsError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["StrictModel", "field_of"]


class StrictModel(BaseModel):
    """A frozen pydantic model that forbids unknown fields and raises `InvalidParamsError` for bad ones.

    The docstring under a field is its description: editors, `--help` and the API page show it from there.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, strict=True, use_attribute_docstrings=True
    )

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise InvalidParamsError.from_pydantic(error) from None

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; each change is checked. What was not set stays so."""
        return type(self)(**{**{name: getattr(self, name) for name in self.model_fields_set}, **changes})

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """`replace`: a change is checked here too. Nothing inside can change, so a deep copy shares it."""
        return self.replace(**(update or {}))

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self


def field_of(kind: type[BaseModel], name: str, **changes: Any) -> Any:
    """A pydantic field with the default, the description and the bounds that `kind` gives its field of that name.

    For a model of another framework that offers our settings: `alpha: float = field_of(DecodingParams, "alpha")`. Its
    JSON schema tells the bounds; making a `kind` of the values checks them. `changes` are arguments of `pydantic.Field`
    that take the place of the core's own.
    """
    field = kind.model_fields[name]
    bounds: dict[str, Any] = {}
    annotated: Any = Annotated[(field.annotation, *field.metadata, Field())]
    with suppress(PydanticInvalidForJsonSchema):  # a field that holds a callable has no schema
        bounds = TypeAdapter(annotated).json_schema()
    own = {"default": field.default, "description": field.description, "json_schema_extra": bounds or None}
    return Field(**{**own, **changes})
