"""The base of everything a caller may set. Knows pydantic; knows no setting."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from detox_guard.errors import InvalidParamsError

__all__ = ["Checked"]


class Checked(BaseModel):
    """A frozen pydantic model that forbids unknown fields and raises `InvalidParamsError` for bad ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise InvalidParamsError.from_pydantic(error) from None

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; checked, unlike pydantic's `model_copy`. What was not set stays so."""
        return type(self)(**{**{name: getattr(self, name) for name in self.model_fields_set}, **changes})
