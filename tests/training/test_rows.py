"""Training: the rows of files, pairs and hub sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import TEXTS
from training_kit import pairs_file, write

from detox_guard.errors import (
    DataError,
)
from detox_guard.training.data import Prompted, read_pairs, read_texts

HERE = Path(__file__).parent


# 1. Rows


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "one, two", "n": 1}\n\n{"text": " three "}\n'),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "one, two"}\r\n{"text": "three"}'),
        ("a.csv", 'id,text\n1,"one, two"\n2,three\n'),
        ("a.tsv", "text\tid\none, two\t1\nthree\t2\n"),
        ("a.csv", 'id,text\r\n1,"one, two"\r\n2,three\r\n'),
        ("a.txt", "one, two\n\n   \nthree"),
    ],
)
def test_formats(tmp_path: Path, name: str, content: str | bytes) -> None:
    rows = read_texts(write(tmp_path / name, content), licence="CC0-1.0")
    assert rows.texts == ("one, two", "three")
    assert (rows.source.name, rows.source.rows, rows.source.licence) == (name, 2, "CC0-1.0")
    assert len(rows.source.sha256) == 64
    assert rows.bad == ()


BAD_JSONL = (
    b'{"text": "fine"}\n{oops\n{"txt": "x"}\n{"text": "  "}\n{"text": 5}\n[1]\n{"text": "\xff"}\n{"text": "\\ud800"}'
)


def test_bad_rows_are_skipped_by_line(tmp_path: Path) -> None:
    rows = read_texts(write(tmp_path / "a.jsonl", BAD_JSONL), max_bad_rows=7)
    assert rows.texts == ("fine",)
    assert [line for line, _ in rows.bad] == [2, 3, 4, 5, 6, 7, 8]
    reasons = " ".join(reason for _, reason in rows.bad)
    for part in ("not JSON", "no 'text'", "is empty", "is int", "not a JSON object", "not valid UTF-8"):
        assert part in reasons


def test_pairs_of_rows(tmp_path: Path) -> None:
    rows = read_pairs(str(pairs_file(tmp_path)))
    assert rows.pairs[0] == (f"zzz qqq {TEXTS[0]}", f"aaa eee {TEXTS[0]}")
    assert rows.bad == ((len(TEXTS) + 1, "no 'neutral'"),)
    prompted = write(tmp_path / "own.csv", "prompt,toxic,neutral\nThe bus,is awful,is late\n")
    assert read_pairs(prompted).pairs == ((Prompted("The bus", " is awful"), Prompted("The bus", " is late")),)
    asked = write(
        tmp_path / "asked.jsonl", '{"question": "How is the bus?", "text": "Late."}\n{"prompt": 3, "text": "Late."}'
    )
    assert read_texts(asked).texts == (Prompted("How is the bus?", "Late.", chat=True), "Late.")
    assert read_texts(prompted, field="toxic").texts == (Prompted("The bus", " is awful"),)
    with pytest.raises(DataError, match="plain text has no toxic and neutral"):
        read_pairs(write(tmp_path / "lines.txt", "one\ntwo\n"))
    with pytest.raises(DataError, match="1 bad rows, 0 allowed"):
        read_pairs(str(pairs_file(tmp_path)), max_bad_rows=0)


def test_too_many_bad_rows(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", BAD_JSONL)
    with pytest.raises(DataError, match=r"7 bad rows, 6 allowed: line 2: not JSON .*line 3: no 'text'") as caught:
        read_texts(source, max_bad_rows=6)
    assert source in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "no usable row"),
        ("a.txt", b"\n \n", "no usable row"),
        ("a.csv", b"", "no usable row"),
        ("a.csv", b"id,words\n1,x\n", "no column 'text'; it has 'id', 'words'"),
        ("a.csv", b'text\n"open', "not readable as CSV"),
        ("a.jsonl", b"\x00\x01\x02", "binary"),
        ("a.jsonl", b"only\nrubbish", "no usable row in it: line 1: not JSON"),
        ("a.parquet", b"PAR1", "not a .jsonl"),
        ("a", b"text", "not a .jsonl"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_texts(write(tmp_path / name, content))
    assert name in str(caught.value)


def test_only_line_ends_end_a_row_of_a_table(tmp_path: Path) -> None:
    rows = read_texts(write(tmp_path / "a.csv", "text,id\nall of\x85this\u2028text\f!,1\n"))
    assert rows.texts == ("all of\x85this\u2028text\f!",)


def test_short_csv_row_is_bad(tmp_path: Path) -> None:
    rows = read_texts(write(tmp_path / "a.csv", "id,text\n1\n2,fine\n"))
    assert (rows.texts, rows.bad) == (("fine",), ((2, "no 'text'"),))


def test_absent_file(tmp_path: Path) -> None:
    for source in (str(tmp_path / "absent.jsonl"), "absent", "a/b/c"):
        with pytest.raises(DataError, match="no such file"):
            read_texts(source)
    with pytest.raises(DataError, match="not a"):
        read_texts(str(tmp_path))


def test_hub_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(name: str, split: str) -> Any:
        if name != "org/name":
            raise ConnectionError("no network")
        return datasets.Dataset.from_dict({"text": [split, "", "two"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_texts("org/name:test[:10%]")
    assert (rows.texts, rows.source.name) == (("test[:10%]", "two"), "org/name:test[:10%]")
    assert rows.bad == ((2, "'text' is empty"),)
    assert read_texts("org/name").texts[0] == "train"
    with pytest.raises(DataError, match="no column 'other'"):
        read_texts("org/name", field="other")
    with pytest.raises(DataError, match="other/name:train: cannot be fetched: no network"):
        read_texts("other/name")
