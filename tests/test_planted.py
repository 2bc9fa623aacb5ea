"""What benches of retrieval share: the choice of questions, and intervals."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from detox_guard import DataError
from detox_guard.evaluation.planted import choose, interval, known_answers, read_toxic

if TYPE_CHECKING:
    from pathlib import Path

ROWS = [{"id": str(i), "question": f"Where is {i}?", "answers": [{"text": "here"}, {"text": "here"}]} for i in range(9)]
TOXIC = ["You fool.", "What a pest.", "Be off.", "Such a bore."]


def test_intervals_hold_the_mean() -> None:
    assert interval([0.0, 1.0] * 50).startswith("0.500 [0.4")
    assert interval([1.0]) == "1.000 [1.000, 1.000]"
    assert interval([]) == "-"


def test_every_second_question_has_a_comment_and_a_seed_chooses_the_same() -> None:
    chosen = choose(ROWS, TOXIC, 6, seed=1, every=2)
    assert chosen == choose(ROWS, TOXIC, 6, seed=1, every=2)
    assert chosen != choose(ROWS, TOXIC, 6, seed=2, every=2)
    assert [bool(one.comment) for one in chosen] == [False, True] * 3
    assert all(one.comment.startswith(f"Reader's comment. {one.text} ") for one in chosen if one.comment)
    assert {one.references for one in chosen} == {("here",)}
    assert all(one.comment for one in choose(ROWS, TOXIC, 99, seed=1))


def test_asked_about_the_comment_only_where_there_is_one() -> None:
    plain = choose(ROWS, TOXIC, 6, seed=1, every=2)
    about = choose(ROWS, TOXIC, 6, seed=1, every=2, about="comment")
    for one, other in zip(plain, about, strict=True):
        assert one.comment == other.comment  # the same data, so that the two can be compared
        assert (one == other) is not bool(one.comment)
        assert one.text in other.text
        assert ("comment" in other.text) is bool(one.comment)
        assert (one.id == other.id) is not bool(one.comment)  # answers of both can stand in one file


def test_a_thread_is_gone_on_with() -> None:
    plain, thread = (choose(ROWS, TOXIC, 6, seed=1, every=2, about=about) for about in ("passage", "thread"))
    for one, other in zip(plain, thread, strict=True):
        assert one.comment == other.comment
        assert other.id == f"{one.id}/thread"
        begun = f"Reader's comment. {one.text}"
        assert other.text == (begun if one.comment else f"Question: {one.text}\nAnswer:")
        assert not one.comment or one.comment.startswith(begun)


def test_answers_are_kept_whatever_is_in_them(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out.jsonl"
    assert known_answers(out, {"seed": 1}) == []
    rows = [{"text": "one\u2028two\x85three\fend"}, {"text": "four"}]
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + '{"tex', encoding="utf-8")
    assert known_answers(out, {"seed": 1}) == rows
    assert out.read_text(encoding="utf-8").endswith('"four"}\n')
    with pytest.raises(DataError, match="other settings"):
        known_answers(out, {"seed": 2})
    (tmp_path / "deep" / "out.settings.json").unlink()
    with pytest.raises(DataError, match="other settings"):
        known_answers(out, {"seed": 1})


def test_toxic_texts_may_hold_any_separator(tmp_path: Path) -> None:
    row = {"prompt": {"text": "one\u2028"}, "continuation": {"text": "two\x85", "toxicity": 0.9}}
    path = tmp_path / "toxic.jsonl"
    path.write_text("\n".join([json.dumps(row, ensure_ascii=False)] * 3), encoding="utf-8")
    assert read_toxic(path) == ["one\u2028two\x85"] * 3
