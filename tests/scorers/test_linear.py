"""The embedded scorer: what it ranks, what disguises it sees through, what it leaves alone, and its shipped weights."""

from __future__ import annotations

import json
import math
import shutil
from typing import TYPE_CHECKING

import pytest
from measuring import KIND, PLAIN, RUDE

from detox_guard.errors import ScorerError
from detox_guard.scorers.base import checked_scores
from detox_guard.scorers.disguise import normalised, undisguised
from detox_guard.scorers.linear import ASSET, BUCKET_BITS, CARD_FILE, WEIGHTS_FILE, EmbeddedScorer, text_windows

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def embedded() -> EmbeddedScorer:
    return EmbeddedScorer.load()


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        (RUDE, KIND),
        ("Shut up, you stupid liar.", "Please be quiet, my friend."),
        ("What a pathetic, worthless loser he is!", "What a cheerful, helpful neighbour he is!"),
        ("YOU ARE A COMPLETE IDIOT", "YOU ARE A COMPLETE SURPRISE"),
    ],
)
def test_ordering(embedded: EmbeddedScorer, worse: str, better: str) -> None:
    high, low = embedded.score([worse, better])
    assert high > 0.5
    assert high > low + 0.2


def test_batch_equals_one_by_one_and_is_deterministic(embedded: EmbeddedScorer) -> None:
    texts = [RUDE, KIND, PLAIN * 30, "", "日本語のテキスト", "e\u0301te\u0301"]
    assert embedded.score(texts) == [embedded.score([text])[0] for text in texts] == embedded.score(texts)
    assert EmbeddedScorer.load().score(texts) == embedded.score(texts)


@pytest.mark.parametrize("text", ["", " \n\t", "\u200b", "\ud800", "a\udfff b", "a", "\0", "😀" * 50, "\ufdfa" * 99])
def test_odd_texts_get_a_score(embedded: EmbeddedScorer, text: str) -> None:
    (score,) = checked_scores(embedded, [text])
    assert score == 0.0 or text.strip().strip("\u200b")


DISGUISED = {
    "capitals": "YOU are a complete IdIoT.",
    "full width": "You are a complete \uff49\uff44\uff49\uff4f\uff54.",
    "mathematical": "You are a complete \U0001d422\U0001d41d\U0001d422\U0001d428\U0001d42d.",
    "circled": "You are a complete ⓘⓓⓘⓞⓣ.",
    "squared": "You are a complete \U0001f178\U0001f173\U0001f178\U0001f17e\U0001f183.",
    "Cyrillic": "You are a complete іdіоt.",
    "small capitals": "You are a complete ɪᴅɪᴏᴛ.",
    "zero width": "You are a complete id\u200bi\u2060ot.",
    "soft hyphen": "You are a complete id\u00adiot.",
    "tags": "You are a complete id\U000e0041iot.",
    "variation selector": "You are a complete id\ufe0fiot.",
    "combining": "You are a complete i\u0335d\u0335iot.",
    "control": "You are a complete id\x08iot.",
    "entity": "You are a complete &#105;diot.",
    "entity between": "You are a complete id&#8203;iot.",
    "long": "You are a complete idiooooooot.",
    "all long": "You are a complete iiidddiiiooottt.",
    "Hangul filler": "You are a complete id\u3164iot.",
    "Braille blank": "You are a complete id\u2800iot.",
    "bold": "You are a complete i**d**iot.",
    "underscores": "You are a complete id_i_ot.",
    "tag of HTML": "You are a complete id<b>io</b>t.",
    "link": "You are a complete [id](http://a.b)iot.",
    "leet": "You are a complete 1d10t.",
    "signs": "You are a complete !d!ot.",
    "spaced": "You are a complete i d i o t.",
    "wide": "You are a complete i  d  i  o  t.",
    "dotted": "You are a complete i.d.i.o.t.",
    "dashes": "You are a complete i-d-i-o-t.",
    "a line each": "You are a complete\ni\nd\ni\no\nt",
    "hyphen at the end": "You are a complete id-\niot.",
    "bare break": "You are a complete idi\not.",
    "emoji between": "You are a complete id🙂iot.",
    "censored": "You are a complete id*ot.",
}


@pytest.mark.parametrize("text", DISGUISED.values(), ids=DISGUISED)
def test_a_disguised_insult_scores_as_the_insult(embedded: EmbeddedScorer, text: str) -> None:
    (score,) = embedded.score([text])
    assert score > 0.5


@pytest.mark.parametrize(
    "text",
    [
        *(
            "* Salt and pepper",
            "**Ingredients:**",
            "# Overview",
            "> *Note*",
            "| a | b |",
            "---",
            "* * *",
            "1. **Mix** it.",
        ),
        *("x = a*b + c**2 - d_i[3]", "max_new_tokens=64, top_p=.9", "kill the process", "for i in range(10): print(i)"),
        *("It costs $15.99, or $5k a year.", "Call 555-0147 at 10:45.", "Samsung A55 and iPhone 15", "A B C D E F G"),
        *("i, j, k = 1, 2, 3", "U.S.A., U.K. and e.g. the E.U.", "her pen is\nnew", "the class\nassesses a bass"),
        *("OK", "woman", "I hope you are well.", "Yes", "Thanks!", "black", "Breast cancer is treatable.", "Essex"),
        *(
            "The killer was sentenced to life.",
            "A gay couple adopted twins.",
            "Dickens wrote it.",
            "привет, мир",
            "今天天气很好",
        ),
    ],
)
def test_ordinary_text_is_left_alone(embedded: EmbeddedScorer, text: str) -> None:
    (score,) = embedded.score([text])
    assert score < 0.3


def test_nothing_rude_is_made_of_harmless_text() -> None:
    plain = normalised("The class\nassembled at 10:45. It costs $15.99; a*b, max_new_tokens and U.S.A. are fine.")
    assert undisguised(plain, lambda words: [0.0] * len(words)) is plain
    assert undisguised(plain, lambda words: [float(word == "idiot") for word in words]) is plain


def test_normalising_keeps_what_a_reader_sees() -> None:
    assert normalised("Caf\u00e9 &amp; bar: 10 \u20ac") == "cafe & bar: 10 \u20ac"
    assert normalised("дом") == "дом"
    assert normalised("раураl") == "paypal"
    assert normalised("a" * 50) == "aaa"


def test_hostile_texts_are_scored(embedded: EmbeddedScorer) -> None:
    hostile = [
        "i d " * 20_000,
        "a\n" * 50_000,
        "<b" * 30_000,
        "&#" * 30_000,
        "1a" * 50_000,
        "a-\n" * 30_000,
        "aabb" * 30_000,
    ]
    assert len(checked_scores(embedded, hostile)) == len(hostile)  # it would not end within the suite's own timeout


def test_an_insult_does_not_drown_in_a_long_text(embedded: EmbeddedScorer) -> None:
    long = PLAIN * 200
    buried, clean = embedded.score([long + RUDE + " " + long, long])
    assert buried > clean + 0.1


def test_windows_cover_everything_and_are_bounded() -> None:
    words = [f"{a}{b}{c}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwxyz"] * 2
    windows = text_windows(" ".join(words))
    assert len(windows) > 1
    assert max(map(len, windows)) <= 1024
    assert all(any(word in window for window in windows) for word in words)


def test_a_huge_text_is_scored_whole(embedded: EmbeddedScorer) -> None:
    assert len(checked_scores(embedded, ["x y z " * 50_000, "q" * 300_000])) == 2


def test_asset_is_small_and_its_card_complete(embedded: EmbeddedScorer) -> None:
    assert sum(file.stat().st_size for file in ASSET.iterdir()) < 3_000_000
    card = embedded.card
    assert card["data"]["licence"] == "Apache-2.0"
    assert {"command", "seed", "cannot_see", "date", "versions", "evaluations", "held_out"} <= set(card)
    assert "/" not in card["data"]["file"]


@pytest.mark.parametrize(
    "damage", ["missing", "truncated", "flipped", "no_card", "bad_card", "other_card", "list_card"]
)
def test_damaged_assets_are_a_named_error(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "scorer"
    shutil.copytree(ASSET, folder)
    weights, card = folder / WEIGHTS_FILE, folder / CARD_FILE
    data = bytearray(weights.read_bytes())
    match damage:
        case "missing":
            weights.unlink()
        case "truncated":
            weights.write_bytes(data[:1000])
        case "flipped":
            data[-1] ^= 1
            weights.write_bytes(data)
        case "no_card":
            card.unlink()
        case "bad_card":
            card.write_text("{")
        case "other_card":
            card.write_text(json.dumps({"weights_sha256": "0"}))
        case "list_card":
            card.write_text("[]")
    with pytest.raises(ScorerError) as caught:
        EmbeddedScorer.load(folder)
    assert caught.value.hint


def test_weights_must_be_finite_and_of_the_right_shape() -> None:
    with pytest.raises(ScorerError, match="shape"):
        EmbeddedScorer([1.0], [1.0], 0.0, [1.0, 1.0], {})
    size = 2**BUCKET_BITS
    with pytest.raises(ScorerError, match="finite"):
        EmbeddedScorer([1.0] * size, [math.nan] * size, 0.0, [1.0, 1.0], {})
    with pytest.raises(ScorerError, match="floors"):
        EmbeddedScorer([1.0] * size, [1.0] * size, 0.0, [1.0, 0.0], {})
