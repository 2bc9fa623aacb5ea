"""`replace_strings`: every string that a reader may see, and nothing else of a value, is changed."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, RootModel

from detox_guard import replace_strings

Pair = namedtuple("Pair", "left right")


@dataclass(frozen=True)
class Note:
    text: str
    made: str = field(init=False, default="")
    count: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "made", f"of {self.text}")


class Loose(BaseModel):
    model_config = ConfigDict(extra="allow")
    text: str


class Many(RootModel[list[str]]):
    def __iter__(self) -> Any:
        return iter(self.root)


@pytest.mark.parametrize(
    ("value", "changed"),
    [
        (b"an idiot", b"AN IDIOT"),
        (bytearray(b"an idiot"), bytearray(b"AN IDIOT")),
        ({"a": ["x", ("y", 3)], 4: None}, {"A": ["X", ("Y", 3)], 4: None}),
        (Pair("x", 1), Pair("X", 1)),
        (frozenset({"x"}), frozenset({"X"})),
    ],
)
def test_plain_values(value: Any, changed: Any) -> None:
    found = replace_strings(value, str.upper)
    assert found == changed
    assert type(found) is type(value)


def test_fields_that_no_constructor_takes_are_changed_and_kept() -> None:
    found = replace_strings(Note("x"), str.upper)
    assert (found.text, found.made, found.count) == ("X", "OF X", 3)


def test_models_with_more_than_they_declare() -> None:
    assert replace_strings(Loose(text="x", more="y"), str.upper).model_dump() == {"text": "X", "more": "Y"}
    assert replace_strings(Many(["ab", "cd"]), str.upper).root == ["AB", "CD"]


def test_keys_may_be_kept() -> None:
    assert replace_strings({"type": "x"}, str.upper, frozenset({"type"})) == {"type": "X"}
