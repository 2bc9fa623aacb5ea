"""Pairs of the backbone's own replies: drawing them, and pairing them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from harness import random_detoxifier

from detox_guard.training.own_pairs import DRAWS, Draw, Drawn, choose_pairs, open_for, sample

if TYPE_CHECKING:
    from detox_guard.models.backbone import Backbone


def test_pairs_are_of_one_prompt() -> None:
    scores = {
        " is bad enough to be told apart": 0.9,
        " is worse, and surely told apart": 0.95,
        " is quite harmless all the same": 0.1,
        " is somewhere in between the two": 0.5,
        ", which begins with no word of its own": 0.99,
        " short": 0.99,
    }
    replies = [Drawn("The bus", text) for text in scores] * 2 + [Drawn("The train", " is quite harmless all the same")]
    rows = choose_pairs(replies, lambda texts: [scores[text] for text in texts])
    assert rows == [
        {"prompt": "The bus", "toxic": toxic, "neutral": "is quite harmless all the same"}
        for toxic in ("is worse, and surely told apart", "is bad enough to be told apart")
    ]


def test_replies_of_a_chat_begin_with_a_word() -> None:
    scores = {"That is surely told apart.": 0.9, "It is quite harmless instead.": 0.1, " It begins with a space": 0.95}
    rows = choose_pairs(
        [Drawn("Hi", text) for text in scores], lambda texts: [scores[text] for text in texts], chat=True
    )
    assert rows == [
        {"question": "Hi", "toxic": "That is surely told apart.", "neutral": "It is quite harmless instead."}
    ]


def test_what_steering_left_over_comes_first() -> None:
    """And harmless replies are the backbone's own, not those that it was leaned to."""
    scores = {
        " is surely toxic where it was leaned to": 0.99,
        " is toxic all by itself": 0.7,
        " is toxic even steered away": 0.65,
        " is harmless where it was leaned to": 0.01,
        " is harmless all by itself": 0.2,
    }
    draws: tuple[Draw, ...] = ("lean", "plain", "away", "lean", "plain")
    replies = [Drawn("The bus", text, draw) for text, draw in zip(scores, draws, strict=True)]
    rows = choose_pairs(replies, lambda texts: [scores[text] for text in texts])
    assert [row["toxic"] for row in rows] == [
        "is toxic even steered away",
        "is toxic all by itself",
        "is surely toxic where it was leaned to",
    ]
    assert {row["neutral"] for row in rows} == {"is harmless all by itself"}
    again = [*replies, Drawn("The bus", replies[2].text, "lean"), Drawn("The bus", replies[4].text, "lean")]
    assert choose_pairs(again, lambda texts: [scores[text] for text in texts]) == rows


@pytest.mark.parametrize("chat", [False, True])
def test_replies_are_drawn_in_each_way(tiny_llama: Backbone, chat: bool) -> None:
    """The same seed gives the same replies; leaned to and steered away they are others than the plain ones."""
    detoxifier, asked = random_detoxifier(tiny_llama), ["My neighbour said", "The weather on the island"]
    texts: dict[Draw, list[str]] = {}
    for draw in DRAWS:
        with open_for(draw, tiny_llama, detoxifier) as model:
            first, again = (sample(model, asked, draw=draw, samples=3, tokens=6, seed=1, chat=chat) for _ in range(2))
        assert first == again
        assert [(one.prompt, one.draw) for one in first] == [(prompt, draw) for prompt in asked for _ in range(3)]
        texts[draw] = [one.text for one in first]
    assert texts["plain"] != texts["lean"] != texts["away"] != texts["plain"]
