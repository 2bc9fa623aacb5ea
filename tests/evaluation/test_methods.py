"""Rows that survive a kill, and the ways of decoding that are measured."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from detox_guard.detoxifiers.soft_prompt import SteeringStream
from detox_guard.errors import DataError, InvalidParamsError
from detox_guard.evaluation.bench import random_detoxifier
from detox_guard.evaluation.methods import METHODS, Ingredients, make_methods
from detox_guard.evaluation.store import Journal
from detox_guard.settings import DecodingParams

if TYPE_CHECKING:
    from pathlib import Path

    from detox_guard.models.backbone import Backbone


def test_journal(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with Journal(path, ("a", "b")) as journal:
        for n in (3, 1, 2):
            journal.add({"a": "x", "b": n, "text": "é\u2028"})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"a": "x", "b": 4, "te')  # cut off by a kill
    with Journal(path, ("a", "b")) as journal:
        assert [("x", n) in journal for n in (1, 2, 3, 4)] == [True, True, True, False]
        journal.add({"a": "x", "b": 4, "text": "again"})
    assert path.read_bytes().startswith(whole)
    assert [json.loads(line)["b"] for line in path.read_text(encoding="utf-8").split("\n")[:-1]] == [3, 1, 2, 4]
    path.write_bytes(whole * 2)
    assert len(Journal(path, ("a", "b")).rows) == 3  # no row counts twice
    path.write_text('{"a": "x"}\n')
    with pytest.raises(DataError, match="without a, b"):
        Journal(path, ("a", "b"))
    path.write_text("{\n")
    with pytest.raises(DataError, match="line 1: not JSON"):
        Journal(path, ("a", "b"))
    path.with_name("rows.jsonl.part").write_bytes(whole)
    with pytest.raises(DataError, match="older version"):
        Journal(path, ("a", "b"))


def test_method_names_and_strengths(tiny_llama: Backbone) -> None:
    stream = SteeringStream(random_detoxifier(tiny_llama, virtual_tokens=4))
    ingredients = Ingredients(tiny_llama, DecodingParams(alpha=0.0), DecodingParams(), (stream,))
    made = make_methods(list(METHODS), [1.0, 2.5, 1.0], ingredients)
    assert [method.name for method in made][:5] == ["plain", "default", "guard", "bounded α=1", "bounded α=2.5"]
    by_name = {method.name: method for method in made}
    assert len(by_name) == len(made) == 2 * 3 + 3
    assert by_name["detoxigen α=1"].params.rule == "detoxigen"
    assert (by_name["guard"].params.guard is None) == (by_name["default"].params.guard is not None)
    assert len({json.dumps(method.identity()) for method in made}) == len(made)
    with pytest.raises(InvalidParamsError, match="methods"):
        make_methods(["other"], [1.0], ingredients)
    with pytest.raises(InvalidParamsError, match="alpha"):
        make_methods(["dexperts"], [0.0], ingredients)
