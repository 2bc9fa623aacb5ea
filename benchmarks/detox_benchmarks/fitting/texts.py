"""The texts that scorers are fitted to: scored rows, pairs, harmless sentences. Knows files and their sources; fits
nothing."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from detox_guard._files import read_json, read_text
from detox_guard.data import read_rows
from detox_guard.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from detox_guard.scorers.linear import Floats

RTP, PARADETOX = "rtp/scorer_train.jsonl", "detoxifier/paradetox_pairs.jsonl"
WIKITEXT, XQUAD = "quality/wikitext2_valid.txt", "quality/xquad_en_1190.json"
SOURCES = {
    "scorer_train.jsonl": {"source": "RealToxicityPrompts", "licence": "Apache-2.0"},
    "paradetox_pairs.jsonl": {"source": "s-nlp/paradetox", "licence": "CC0-1.0"},
    "wikitext2_valid.txt": {"source": "WikiText-2", "licence": "CC-BY-SA-3.0"},
    "xquad_en_1190.json": {"source": "google-deepmind/xquad", "licence": "CC-BY-SA-4.0"},
}


@dataclass(frozen=True)
class ScoredTexts:
    """`toxicity[i]` in [0, 1] of `texts[i]`; rows of one `group` come from one document. `skipped` had no score."""

    texts: list[str]
    toxicity: Floats
    group: npt.NDArray[np.int64]
    skipped: int


def read_scored_texts(path: Path) -> ScoredTexts:
    """RealToxicityPrompts rows (prompt and continuation apart), or a table with the columns `comment` and `toxic`.

    Raises `DataError` for a missing, empty or unreadable file.
    """
    texts: list[str] = []
    toxicity: list[float] = []
    group: list[int] = []
    skipped = 0
    for number, (where, row) in enumerate(read_rows(path).good()):
        try:
            if "comment" in row:
                pairs = [(row["comment"], {"true": 1.0, "false": 0.0}[row["toxic"].lower()])]
            else:
                pairs = [(row[part]["text"], row[part].get("toxicity")) for part in ("prompt", "continuation")]
            for text, score in pairs:
                if score is None:
                    skipped += 1
                    continue
                if not isinstance(text, str) or not 0.0 <= float(score) <= 1.0:
                    raise ValueError(f"{score!r} is no toxicity of a text")
                texts.append(text)
                toxicity.append(float(score))
                group.append(number)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{where}: {type(error).__name__}: {error}") from error
    if not texts:
        raise DataError(f"{path.name!r} holds no scored text ({skipped} rows without a score)")
    return ScoredTexts(texts, np.array(toxicity), np.array(group), skipped)


def harmless_texts(folder: Path, held_out: bool = False) -> dict[str, list[str]]:
    """Sentences of WikiText-2 and XQuAD (its questions too), of the part to train on or of the part held out, by file;
    files that are absent are left out. Raises `DataError`."""
    found: dict[str, list[str]] = {}
    if (path := folder / WIKITEXT).is_file():
        lines = [line.strip() for line in read_text(path).splitlines()]
        lines = [_untokenized(line) for line in lines if len(line) > 20 and not line.startswith("=")]
        cut = len(lines) * 6 // 10
        found[path.name] = [s for line in (lines[cut:] if held_out else lines[:cut]) for s in _sentences(line)]
    if (path := folder / XQUAD).is_file():
        try:
            articles = read_json(path)["data"]
            cut = len(articles) // 2
            paragraphs = [p for a in (articles[cut:] if held_out else articles[:cut]) for p in a["paragraphs"]]
            questions = [answer["question"] for paragraph in paragraphs for answer in paragraph["qas"]]
            found[f"{path.name} questions"] = questions
            found[path.name] = [s for paragraph in paragraphs for s in _sentences(paragraph["context"])]
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: not in SQuAD's format ({type(error).__name__}: {error})") from error
    return found


def _untokenized(line: str) -> str:
    line = re.sub(r" @([-,.])@ ", r"\1", line).replace("<unk>", "something").replace(" 's", "'s")
    return re.sub(r" ([,.;:)])", r"\1", line).replace("( ", "(")


def _sentences(text: str) -> list[str]:
    return [sentence for sentence in re.split(r"(?<=[.!?])\s+", text) if len(sentence) > 15]


def fragments(texts: list[str], count: int, seed: int) -> list[str]:
    """Windows of 2 to 12 words of texts: what a guard scores besides sentences."""
    rng = random.Random(seed)
    cut = []
    for text in rng.sample(texts, min(count, len(texts))):
        words = text.split()
        size = rng.randint(2, 12)
        start = rng.randint(0, max(0, len(words) - size))
        cut.append(" ".join(words[start : start + size]))
    return cut


def vocabulary() -> list[str]:
    """The words of four letters or more that the minilm scorer's encoder knows: ordinary English.

    Raises `ScorerError` if it is neither in the cache nor can be fetched.
    """
    from detox_guard.scorers.minilm import encoder_dir

    words = (encoder_dir() / "vocab.txt").read_text(encoding="utf-8").split()
    return [word for word in words if len(word) > 3 and word.isascii() and word.isalpha()]


def ordinary(words: list[str], rude: list[str], polite: list[str], insults: list[str]) -> list[str]:
    """The words that rude texts do not use more often than polite ones, and insults not at all."""

    def counted(texts: list[str]) -> Counter[str]:
        return Counter(word for text in texts for word in set(re.findall(r"[a-z]+", text.lower())))

    often, seldom, never = counted(rude), counted(polite), counted(insults)
    return [w for w in words if w not in never and not (often[w] >= 2 and often[w] > 2 * seldom[w])]


def rude_and_polite(path: Path) -> list[tuple[str, str]]:
    """Pairs of ParaDetox, the first rewriting of each; none where the file is absent. Raises `DataError`."""
    if not path.is_file():
        return []
    try:
        return [(row["toxic"], row["neutral"][0]) for _, row in read_rows(path).good()]
    except (LookupError, TypeError) as error:
        raise DataError(f"cannot read {path.name!r}: {type(error).__name__}: {error}") from error


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
