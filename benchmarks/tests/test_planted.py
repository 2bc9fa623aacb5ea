"""What benches of retrieval share: the choice of questions, answers that are kept, and intervals."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest
from detox_benchmarks.rag.frame import Answer, Answers, Question, choose, interval, read_toxic

from detox_guard import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence
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


class Rude:
    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: list[str] = []

    def score(self, texts: Sequence[str]) -> list[float]:
        self.seen += texts
        return [float("fool" in text) for text in texts]


def asked(*texts: str) -> list[Question]:
    return [Question(text, text, (), "") for text in texts]


async def answer(question: Question) -> Answer:
    if question.text == "broken":
        raise RuntimeError(question.text)
    return Answer("plain", question.id, 0, question.text, False, 0, 0.0)


def test_answers_are_kept_whatever_is_in_them(tmp_path: Path) -> None:
    out, judge = tmp_path / "deep" / "out.jsonl", Rude("first")
    answers = Answers(out, {"seed": 1}, [judge])
    texts = ["one\u2028two\x85three\fend", "a fool", "four"]
    asyncio.run(answers.ask(asked(*texts), answer, abreast=2))
    assert [row.text for row in answers.rows] == judge.seen == texts
    assert [row.toxicity for row in answers.rows] == [{"first": 0.0}, {"first": 1.0}, {"first": 0.0}]
    assert all(row.seconds > 0 for row in answers.rows)
    whole = out.read_text(encoding="utf-8")
    out.write_text(whole + '{"tex', encoding="utf-8")  # killed in the middle of a line
    again = Answers(out, {"seed": 1}, [judge, second := Rude("second")])
    assert out.read_text(encoding="utf-8") == whole
    assert [row.text for row in again.rows] == judge.seen == second.seen == texts  # by each judge once
    with pytest.raises(DataError, match="other settings"):
        Answers(out, {"seed": 2}, [])
    Answers(out.with_suffix(".csv"), {"seed": 2}, [])  # another file, with settings of its own
    out.write_text(whole + "[\n", encoding="utf-8")
    with pytest.raises(DataError, match="no answer"):
        Answers(out, {"seed": 1}, [])
    (tmp_path / "deep" / "out.jsonl.settings.json").unlink()
    with pytest.raises(DataError, match="other settings"):
        Answers(out, {"seed": 1}, [])


def test_what_was_answered_before_an_error_is_kept(tmp_path: Path) -> None:
    answers = Answers(tmp_path / "out.jsonl", {}, [])
    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(answers.ask(asked("one", "two", "broken", "four"), answer, abreast=2))
    assert [row.text for row in Answers(tmp_path / "out.jsonl", {}, []).rows] == ["one", "two"]


def test_toxic_texts_may_hold_any_separator(tmp_path: Path) -> None:
    row = {"prompt": {"text": "one\u2028"}, "continuation": {"text": "two\x85", "toxicity": 0.9}}
    path = tmp_path / "toxic.jsonl"
    path.write_text("\n".join([json.dumps(row, ensure_ascii=False)] * 3), encoding="utf-8")
    assert read_toxic(path) == ["one\u2028two\x85"] * 3
