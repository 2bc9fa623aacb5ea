"""What benches of retrieval share: the choice of questions, and intervals."""

from __future__ import annotations

from detox_guard.evaluation.planted import choose, interval

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
