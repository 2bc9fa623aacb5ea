"""The one reader of rows: formats, where a row stands, and what is refused."""

from __future__ import annotations

import gzip
import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from detox_guard.data import BadRow, parse_rows, read_rows, text_at
from detox_guard.errors import DataError, DetoxGuardError

if TYPE_CHECKING:
    from pathlib import Path

ROWS = [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize(
    ("name", "content", "numbers"),
    [
        ("a.jsonl", '{"text": "one"}\n\n{"text": "two"}\n', [1, 3]),
        ("a.json", json.dumps(ROWS), [1, 2]),
        ("a.csv", "text\none\ntwo\n", [2, 3]),
        ("a.tsv", "text\none\ntwo\n", [2, 3]),
        ("a.txt", "one\r\n \ntwo", [1, 3]),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_every_format_packed_or_not(name: str, content: str, numbers: list[int], packed: bool, tmp_path: Path) -> None:
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    found = read_rows(path)
    assert [text_at(row.value, "text") for row in found.rows] == ["one", "two"]
    assert [row.number for row in found.rows] == numbers
    assert len(found.sha256) == 64
    assert found.where(found.rows[1]) == f"{path}: {found.unit} {numbers[1]}"


def test_a_pipe_is_json_by_its_first_line() -> None:
    assert [row.value for row in parse_rows(b'{"text": "one"}\n{', "stdin").rows] == [{"text": "one"}, None]
    assert [row.value for row in parse_rows(b'{no json\n{"a": 1}', "stdin").rows] == ["{no json", '{"a": 1}']
    assert parse_rows(b"", "stdin").rows == []


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([1], "not a JSON object"),
        ({}, "no 'text'"),
        ({"text": 5}, "'text' is int, not a string"),
        ({"text": " "}, "'text' is empty"),
        ({"text": {"toxicity": 1}}, "'text' is dict"),
        ({"text": "\ud800"}, "not valid UTF-8"),
    ],
)
def test_what_no_text_is_in(row: Any, said: str) -> None:
    with pytest.raises(BadRow, match=said):
        text_at(row, "text")
    assert text_at({"text": {"text": " one ", "toxicity": 1}}, "text") == "one"


def test_bad_files_and_the_first_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{')
    with pytest.raises(DataError, match="line 2: not JSON"):
        list(read_rows(path).good())
    for name, content, said in (
        ("a.json", b"{", "not JSON"),
        ("a.gz", b"x", "not a .jsonl"),
        ("a.txt.gz", b"x", "cannot be read"),
        ("a.txt", b"a\0b", "binary"),
        ("a.parquet", b"PAR1", "not a .jsonl"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=said):
            read_rows(tmp_path / name)
    assert read_rows(tmp_path / "a.parquet", other=".txt").rows[0].value == "PAR1"


def test_the_hub_needs_a_package_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DetoxGuardError, match="needs the package datasets") as caught:
        read_rows("org/name")
    assert "detox-guard[" in caught.value.hint
