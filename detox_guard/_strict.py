"""The base of everything a caller may set. Knows pydantic; knows no setting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from detox_guard.errors import InvalidParamsError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["StrictModel"]


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
