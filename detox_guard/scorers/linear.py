"""How toxic is a text? A number in [0, 1], from the embedded linear model or from a Hugging Face classifier.

Knows text, hashed n-grams and classifiers. Does not know the engine, the detoxifier or what a score is used for, and
never fits anything (`detox_benchmarks` does). torch and transformers are imported only when a Hugging Face
model is loaded.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from detox_guard.errors import ScorerError
from detox_guard.scorers.disguise import normalised, undisguised

__all__ = ["EmbeddedScorer", "HuggingFaceScorer", "ToxicityScorer", "checked_scores", "load_scorer"]

ASSET = Path(__file__).parents[1] / "assets" / "scorer"
WEIGHTS_FILE, CARD_FILE = "weights.safetensors", "card.json"
BUCKET_BITS = 19
WINDOW_CHARS, WINDOW_STEP = 1024, 896
CHAR_NGRAMS = (2, 3, 4, 5)
RUDE_WORD = 15.0
OFTEN_IDF = 9.5
"""A word with a lower idf was met often in training: English has few others."""
"""Weight times idf from which a single word is taken for rude where a disguise is undone."""

UInts = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]


@runtime_checkable
class ToxicityScorer(Protocol):
    """Anything with a `name` and a batched `score`. A plug-in need not inherit from this."""

    @property
    def name(self) -> str:
        """Short and stable, for reports."""

    def score(self, texts: Sequence[str]) -> list[float]:
        """One number in [0, 1] a text, in order; 1 is toxic."""


def checked_scores(scorer: ToxicityScorer, texts: Sequence[str]) -> list[float]:
    """The scorer's numbers, or an error: a guard that cannot judge must not let text through.

    Raises `ScorerError` for a failing scorer, an answer that is no list, tuple or array (a mapping, text, bytes, a set
    or a generator), what is no number in it, a wrong count, NaN, or a number outside [0, 1].
    """
    if not texts:
        return []
    name = getattr(scorer, "name", type(scorer).__name__)
    try:
        answer = scorer.score(texts)
        if not isinstance(answer, Sequence) and not hasattr(answer, "tolist"):  # an array or tensor is a sequence too
            raise ScorerError(f"scorer {name!r} answered a {type(answer).__name__}, not a list of numbers")
        if isinstance(answer, str | bytes | bytearray | memoryview):
            raise ScorerError(f"scorer {name!r} answered {type(answer).__name__}, not a list of numbers")
        scores = [_number(score) for score in answer]
    except ScorerError:
        raise
    except Exception as error:
        raise ScorerError(f"scorer {name!r} failed: {type(error).__name__}: {error}") from error
    if len(scores) != len(texts):
        raise ScorerError(f"scorer {name!r} gave {len(scores)} scores for {len(texts)} texts")
    for score in scores:
        if not 0.0 <= score <= 1.0:  # false for NaN too
            raise ScorerError(f"scorer {name!r} gave {score}, which is not in [0, 1]")
    return scores


def _number(score: Any) -> float:
    """A score as a float. Text that spells a number is none."""
    if isinstance(score, str | bytes | bytearray):
        raise TypeError(f"{type(score).__name__} is no number")
    return float(score)


@functools.cache
def _named(name: str) -> ToxicityScorer:
    if name == "embedded":
        return EmbeddedScorer.load()
    if name == "minilm":
        from detox_guard.scorers.minilm import MiniLMScorer

        return MiniLMScorer()
    if name == "profanity-check":
        from detox_guard.scorers.words import ProfanityCheck

        return ProfanityCheck()
    model_id, _, label = name.partition("#")
    return HuggingFaceScorer(model_id, label=label or None)


def load_scorer(spec: str | ToxicityScorer | None = None) -> ToxicityScorer:
    """None or "embedded": the embedded scorer. "minilm": the small transformer of `scorers.minilm`, fetched once.
    "profanity-check": the package alt-profanity-check, which is no scorer of the guard's family.
    Another string: a Hugging Face model, `org/model`, or `org/model#LABEL` where its toxic label has to be named. A
    scorer: itself.

    A name gives the same scorer each time. Raises `ScorerError`.
    """
    if spec is None or isinstance(spec, str):
        return _named(spec or "embedded")
    if isinstance(spec, ToxicityScorer):
        return spec
    raise ScorerError(f"{type(spec).__name__} is no scorer", hint="give a name, or an object with .name and .score()")


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


class HuggingFaceScorer:
    """Any Hugging Face text classifier, by hub id or folder, loaded at the first score.

    `label` names the toxic class; by default it is found by its name. Multi-label models are read through a sigmoid,
    others through a softmax. A text longer than the model is scored in overlapping windows and gets the worst. Code
    from the hub is never run, and weights that are not safetensors are refused. `score` raises `ScorerError` if the
    model cannot be loaded or no label is surely the
    toxic one.
    """

    def __init__(
        self,
        model_id: str,
        *,
        revision: str | None = None,
        device: str | None = None,
        label: str | None = None,
        batch_size: int = 16,
    ) -> None:
        if batch_size < 1:
            raise ScorerError(f"batch_size must be at least 1, not {batch_size}")
        self.name = model_id if label is None else f"{model_id}#{label}"
        self._model_id = model_id
        self._revision, self._device, self._label, self._batch_size = revision, device, label, batch_size
        self._lock = threading.Lock()
        self._loaded: tuple[Any, Any, int, int] | None = None

    def load(self) -> None:
        """Load the model now, unless it is there. Raises `ScorerError`."""
        self._load()

    @property
    def fingerprint(self) -> str:
        """Tells classifiers of one name apart, by their weights. Raises `ScorerError`."""
        from detox_guard.models.backbone import fingerprint_of

        return fingerprint_of(self._load()[0])

    def score(self, texts: Sequence[str]) -> list[float]:
        """One number in [0, 1] a text. Raises `ScorerError`."""
        if not texts:
            return []
        import torch

        model, tokenizer, toxic, max_tokens = self._load()
        # A tokenizer refuses lone surrogates; a question mark stands in for each.
        clean = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        windows = tokenizer(
            clean, truncation=True, max_length=max_tokens, stride=max_tokens // 8, return_overflowing_tokens=True
        )
        owner = windows.pop("overflow_to_sample_mapping")
        scores = [0.0] * len(texts)
        for first in range(0, len(owner), self._batch_size):
            part = slice(first, first + self._batch_size)
            batch = tokenizer.pad({key: value[part] for key, value in windows.items()}, return_tensors="pt")
            with torch.inference_mode():
                logits = model(**batch.to(model.device)).logits.float()
            if logits.shape[-1] == 1 or model.config.problem_type == "multi_label_classification":
                probabilities = logits.sigmoid()[:, toxic]
            else:
                probabilities = logits.softmax(-1)[:, toxic]
            for text_index, probability in zip(owner[part], probabilities.tolist(), strict=True):
                if math.isnan(probability):
                    raise ScorerError(f"{self.name!r} gave NaN")
                scores[text_index] = max(scores[text_index], probability)
        return scores

    def _load(self) -> tuple[Any, Any, int, int]:
        with self._lock:
            if self._loaded is None:
                from transformers import AutoModelForSequenceClassification, AutoTokenizer

                source = {"revision": self._revision, "trust_remote_code": False}
                weights = {"use_safetensors": True}  # a pickle can run code
                try:
                    tokenizer = AutoTokenizer.from_pretrained(self._model_id, **source)
                    model = AutoModelForSequenceClassification.from_pretrained(self._model_id, **source, **weights)
                    model = model.eval().to(self._device or "cpu")
                except Exception as error:
                    raise ScorerError(
                        f"cannot load the classifier {self.name!r}: {type(error).__name__}: {error}",
                        hint='check the name and the network, give a local folder with safetensors, or use "embedded"',
                    ) from error
                if not tokenizer.is_fast:
                    raise ScorerError(f"{self.name!r} has no fast tokenizer, so long texts cannot be windowed")
                # RoBERTa-like models lose up to two positions to padding.
                positions = getattr(model.config, "max_position_embeddings", None) or 514
                max_tokens = min(tokenizer.model_max_length, positions - 2)
                self._loaded = model, tokenizer, _toxic_index(model.config.id2label, self._label), max_tokens
            return self._loaded


def _toxic_index(id2label: dict[int, str], wanted: str | None) -> int:
    """The index of the toxic class. Raises `ScorerError` naming the labels when that is not certain."""
    names = {index: str(name).lower() for index, name in id2label.items()}
    says_toxic = re.compile(r"(toxic|toxicity|hate|hateful|offensive|abusive)([-_ ]?(speech|language|text|comment))?")
    says_not = re.compile(r"(no[nt]?(?![a-z])|non|not).*|neutral|normal|clean|safe|ok|none|acceptable|benign|nothate")
    if wanted is not None:
        found = [index for index, name in names.items() if name == wanted.lower()]
    elif len(names) == 1:
        found = list(names)
    else:
        found = [index for index, name in names.items() if name in ("toxic", "toxicity")]
        toxic, other = ([i for i, name in names.items() if says.fullmatch(name)] for says in (says_toxic, says_not))
        if not found and len(names) == 2 and toxic and other:  # of more classes, others may be toxic too
            found = toxic
    if len(found) != 1:
        problem = "no label fits" if not found else "several labels fit"
        raise ScorerError(
            f"{problem} {wanted or 'toxic'!r} among {sorted(map(str, id2label.values()))}",
            hint="name one: 'org/model#LABEL', or label=",
        )
    return found[0]
