"""The embedded scorer: a linear model on hashed n-grams, in numpy. Knows its features and its weights; never fits them
(`detox_benchmarks` does), and knows not what a score is used for.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from detox_guard.errors import ScorerError
from detox_guard.scorers.disguise import normalised, undisguised

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["EmbeddedScorer", "read_weights"]

ASSET = Path(__file__).parents[1] / "assets" / "scorer"
WEIGHTS_FILE, CARD_FILE = "weights.safetensors", "card.json"
BUCKET_BITS = 19
WINDOW_CHARS, WINDOW_STEP = 1024, 896
CHAR_NGRAMS = (2, 3, 4, 5)
RUDE_WORD = 15.0
"""Weight times idf from which a single word is taken for rude where a disguise is undone."""
OFTEN_IDF = 9.5
"""A word with a lower idf was met often in training: English has few others."""

UInts = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]


# --- features: hashed words, pairs of words and character n-grams --------------------------------------------------

_CENSORED = re.compile(r"(?<![^\W_])(?<!\*)([a-z]{1,4})(?:\*+(?=[a-z]{1,8}(?![\w*]))|(?<=[a-z])\*{2,}(?![\w*]))")
_APOSTROPHE = re.compile(r"(?<=[^\W_])['’ʼ`´](?=[^\W_])")
_DIGIT = re.compile(r"[0-9]")
_WORD = re.compile(r"[^\W_]+")
_MASK = "ж"
"""A letter of no English word stands for the stars of a censored one."""


def text_windows(text: str) -> list[str]:
    """The words of a normalised text, one space between them, in overlapping pieces of at most `WINDOW_CHARS`
    characters; none if there is no word.

    Punctuation and markup are no evidence, and digits but say that there is a number. Windows keep a short insult from
    drowning in a long text. Nothing is left out: work is linear in the length.
    """
    if "*" in text:
        text = _CENSORED.sub(rf"\1{_MASK}", text)
    text = _LONG_RUN.sub(r"\1\1", _DIGIT.sub("0", _APOSTROPHE.sub("", text)))
    text = " ".join(_WORD.findall(text))
    return (
        [text[i : i + WINDOW_CHARS] for i in range(0, max(1, len(text) - (WINDOW_CHARS - WINDOW_STEP)), WINDOW_STEP)]
        if text
        else []
    )


_LONG_RUN = re.compile(r"(.)\1{2,}", re.DOTALL)
_BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2**64
_INVERSE = pow(_BASE, -1, 2**64)


def _powers(base: int) -> UInts:
    powers = np.full(WINDOW_CHARS + 3, base, dtype=np.uint64)  # two pad spaces and the power 0
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


_BASE_POWERS, _INVERSE_POWERS = _powers(_BASE), _powers(_INVERSE)


def _buckets(hashes: UInts) -> npt.NDArray[np.int64]:
    """The top bits after the splitmix64 finaliser (Steele et al. 2014): a polynomial hash has poor low bits."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((hashes ^ (hashes >> np.uint64(31))) >> np.uint64(64 - BUCKET_BITS)).astype(np.int64)


def ngram_buckets(window: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Bucket numbers, with repeats, of the words and pairs of words of one window, and of its character 2- to 5-grams.

    Character n-grams stay inside a word padded with spaces. All hashes come from one prefix sum of a polynomial modulo
    2**64: h(i, j) = (S[j] - S[i]) · base**-i, with S[j] = Σ_{k<j} char[k] · base**k.
    """
    chars = np.frombuffer(f" {window} ".encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    prefix = np.zeros(len(chars) + 1, dtype=np.uint64)
    np.cumsum(chars * _BASE_POWERS[: len(chars)], out=prefix[1:])
    blank = chars == 32
    spaces = np.concatenate(([0], np.cumsum(blank)))

    def hashed(start: npt.NDArray[np.int64], stop: npt.NDArray[np.int64], kind: int) -> npt.NDArray[np.int64]:
        return _buckets((prefix[stop] - prefix[start]) * _INVERSE_POWERS[start] + np.uint64(kind))

    grams = []
    for size in CHAR_NGRAMS:
        start = np.arange(max(0, len(chars) - size + 1))
        start = start[spaces[start + size - 1] == spaces[start + 1]]  # no space but at the two ends
        grams.append(hashed(start, start + size, size))
    edges = np.flatnonzero(blank)
    start, stop = edges[:-1] + 1, edges[1:]
    start, stop = start[stop > start], stop[stop > start]  # a window may begin or end with a space
    return (
        np.concatenate((hashed(start, stop, 101), hashed(start[:-1], stop[1:], 102))),
        np.concatenate(grams),
    )


def word_buckets(words: Sequence[str]) -> npt.NDArray[np.int64]:
    """The bucket numbers of single words, each of at most `WINDOW_CHARS` characters."""
    if not words:
        return np.zeros(0, dtype=np.int64)
    lengths = np.array([len(word) for word in words])
    chars = np.frombuffer("".join(words).encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    place = np.arange(len(chars)) - np.repeat(starts, lengths)
    sums = np.concatenate((np.zeros(1, dtype=np.uint64), np.cumsum(chars * _BASE_POWERS[place], dtype=np.uint64)))
    return _buckets(sums[starts + lengths] - sums[starts] + np.uint64(101))


def tf_idf(buckets: npt.NDArray[np.int64], idf: Floats, floor: float) -> tuple[npt.NDArray[np.int64], Floats]:
    """Distinct buckets and their (1 + ln tf) · idf, over their L2 norm or `floor`, whichever is larger: a few words do
    not weigh as much as many."""
    distinct, counts = np.unique(buckets, return_counts=True)
    values: Floats = (1.0 + np.log(counts)) * idf[distinct]
    return distinct, values / max(float(np.linalg.norm(values)), floor)


# --- scorers -----------------------------------------------------------------------------------------------------


class EmbeddedScorer:
    """A linear model on hashed TF-IDF features: numpy only, two megabytes, about 1 ms a sentence.

    The score is an estimate of Perspective's toxicity: sigmoid(bias + Σ_blocks weight · tfidf). A text longer than
    a window gets the score of its worst window; a text without a word gets 0. Words that their spelling hides are read
    too (`detox_guard.scorers.disguise`). It sees explicit toxicity in English; see `card` for what it cannot see.
    """

    name = "embedded"

    def __init__(
        self, idf: npt.ArrayLike, weight: npt.ArrayLike, bias: float, floors: Sequence[float], card: dict[str, Any]
    ) -> None:
        self._idf = np.asarray(idf, dtype=np.float64)
        self._weight = np.asarray(weight, dtype=np.float64)
        self._bias = float(bias)
        self._floors = tuple(map(float, floors))
        self.card = card
        if self._idf.shape != (2**BUCKET_BITS,) or self._weight.shape != self._idf.shape or len(self._floors) != 2:
            raise ScorerError(f"scorer weights have shapes {self._idf.shape} and {self._weight.shape}")
        if not (np.isfinite(self._idf).all() and np.isfinite(self._weight).all() and math.isfinite(self._bias)):
            raise ScorerError("scorer weights hold numbers that are not finite")
        if not all(math.isfinite(floor) and floor > 0 for floor in self._floors):
            raise ScorerError(f"scorer floors must be positive, not {self._floors}")

    @classmethod
    def load(cls, path: str | Path | None = None) -> Self:
        """The scorer in a folder (None: the one shipped), read now. Raises `ScorerError` if missing or damaged."""
        folder = ASSET if path is None else Path(path)
        card, tensors = read_weights(folder)
        try:
            return cls(tensors["idf"], tensors["weight"], tensors["bias"].item(), tensors["floors"].tolist(), card)
        except (ValueError, KeyError, TypeError) as error:
            raise _unreadable(folder, error) from error

    @property
    def fingerprint(self) -> str:
        """Tells scorers of one name apart: the SHA-256 of the weights, as its card says."""
        return str(self.card.get("weights_sha256"))

    def score(self, texts: Sequence[str]) -> list[float]:
        """One number in [0, 1] a text. A text's score does not depend on its neighbours."""
        return [max(map(self._score, self.readings(text)), default=0.0) for text in texts]

    def readings(self, text: str) -> list[str]:
        """The text normalised and, where its spelling hides rude words, with these; the worse one counts."""
        plain = normalised(text)
        bare = undisguised(plain, self._rude)
        return [plain] if bare is plain else [plain, bare]

    def _rude(self, words: Sequence[str]) -> list[float]:
        """How much each word alone weighs beyond what makes it rude; 0 if it does not."""
        buckets = word_buckets(words)
        return list(np.maximum(self._weight[buckets] * self._idf[buckets] - RUDE_WORD, 0.0))

    def reads(self, text: str) -> bool:
        """Whether at least half of the words are ones that the scorer was often shown, as they are in English. A text
        without a word counts as read."""
        words = _WORD.findall(_DIGIT.sub("0", _APOSTROPHE.sub("", normalised(text))))
        words = [word[:WINDOW_CHARS] for word in words if not word.isdecimal()]
        return not words or float((self._idf[word_buckets(words)] < OFTEN_IDF).mean()) >= 0.5

    def raw_logit(self, text: str) -> float:
        """The logit of a normalised text before calibration, of its worst window."""
        stretch, shift = (self.card["calibration"][name] for name in ("stretch", "shift"))
        score = min(max(self._score(text), 1e-9), 1 - 1e-9)
        return float((math.log(score / (1 - score)) - shift) / stretch)

    def _score(self, text: str) -> float:
        return max(map(self._score_window, text_windows(text)), default=0.0)

    def _score_window(self, window: str) -> float:
        logit = self._bias
        for block, floor in zip(ngram_buckets(window), self._floors, strict=True):
            distinct, values = tf_idf(block, self._idf, floor)
            logit += float(values @ self._weight[distinct])
        return 0.5 * (1.0 + math.tanh(0.5 * logit))  # the sigmoid, without overflow


def read_weights(folder: Path) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """The card and the tensors in a scorer's folder, of which the card says the hash. Raises `ScorerError`."""
    try:
        card = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
        data = (folder / WEIGHTS_FILE).read_bytes()
        if hashlib.sha256(data).hexdigest() != card["weights_sha256"]:
            raise ValueError("the weights are not those the card describes")
        return card, safetensors.load(data)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> ScorerError:
    return ScorerError(
        f"cannot load the scorer in {folder.name!r}: {type(error).__name__}: {error}",
        hint="reinstall detox-guard, or train one with python -m detox_benchmarks.fitting.linear",
    )
