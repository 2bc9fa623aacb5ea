"""Fits the embedded scorer: a linear model over hashed TF-IDF features, for the logit of Perspective toxicity.

Knows the training texts, the fit, the calibration, the card and how a scorer is measured. The features and the formula
of the score are `detox_guard.scorers.linear`'s. Needs scipy and scikit-learn (the `dev` extra)::

    python -m detox_benchmarks fit linear --data FOLDER --output FOLDER [--evaluate FILE ...]
    python -m detox_benchmarks fit linear --output FOLDER --evaluate FILE ...        # measure only

The folder of data holds `rtp/scorer_train.jsonl`, and, where they are at hand, `detoxifier/paradetox_pairs.jsonl`,
`quality/wikitext2_valid.txt` and `quality/xquad_en_1190.json`. Made-up texts (`clean_texts`) join
them. Rows with a score are fitted; harmless texts only must not score high, mild insults only must not score low, and a
rude sentence must score above its polite rewriting, so that what is merely written elsewhere moves nothing.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import math
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors import numpy as safetensors

from detox_benchmarks.fitting.clean_texts import GROUPS, IDENTITY_WORDS, ONES, clean_texts, contrasts, salads
from detox_benchmarks.fitting.texts import (
    PARADETOX,
    RTP,
    SOURCES,
    WIKITEXT,
    XQUAD,
    fragments,
    harmless_texts,
    ordinary,
    read_scored_texts,
    rude_and_polite,
    sha256_of,
    vocabulary,
)
from detox_guard._files import write_whole
from detox_guard.errors import DataError
from detox_guard.scorers.base import TOXIC_FROM
from detox_guard.scorers.disguise import normalised
from detox_guard.scorers.linear import (
    BUCKET_BITS,
    CARD_FILE,
    WEIGHTS_FILE,
    EmbeddedScorer,
    Floats,
    ngram_buckets,
    text_windows,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["evaluate", "fit", "train"]

SEED, FOLDS = 0, 4
RIDGE, SMOOTHING, LEAST_RATIO = 0.35, 1.0, 0.6
FLOORS = (35.0, 70.0)
"""Least norms of the two blocks: those of a sentence of some fifteen words."""
PAIR_SHARE, CONTRAST_SHARE = 0.2, 0.05
"""How much a paired text counts in the ratio of a feature, beside a scored one."""
ODDS = 0.5
"""A text met in use is toxic half as often as one of the rows that the calibration is fitted to."""
MADE_UP, INSULTS = 14_000, 3_000
LIMITS = [
    "implicit hate and anything that is toxic only in its context: near chance",
    "languages other than English",
    "mentions of identity groups score too high, quoted or reclaimed words likewise",
    "trained on short web text scored by Perspective, whose own errors and biases it inherits",
]


def evaluate(scorer: EmbeddedScorer, path: Path) -> dict[str, Any]:
    """ROC-AUC for toxicity ≥ .5 on one file, and how many of its rows are, and are scored, ≥ .5. Raises `DataError`."""
    rows = read_scored_texts(path)
    scores = np.array(scorer.score(rows.texts))
    return {"file": path.name, "sha256": sha256_of(path), **_figures(rows.toxicity, scores), "skipped": rows.skipped}


def _figures(toxicity: Floats, scores: Floats) -> dict[str, Any]:
    from sklearn.metrics import roc_auc_score

    toxic, found = toxicity >= TOXIC_FROM, scores >= TOXIC_FROM
    auc = round(float(roc_auc_score(toxic, scores)), 4) if 0 < toxic.sum() < len(toxic) else None
    return {
        "rows": len(toxic),
        "toxic": int(toxic.sum()),
        "scored_toxic": int(found.sum()),
        "roc_auc": auc,
    }


class _Fit:
    """idf, weight and bias of a ridge fitted to scored rows, under one-sided losses for the others; `predict` gives
    logits."""

    def __init__(self, rows: list[Any], logits: Floats, others: list[_Side], pairs: list[_Pairs]) -> None:
        from scipy import sparse
        from scipy.optimize import minimize

        # Scaling each feature by its log-count ratio (NB-SVM, Wang & Manning 2012) shrinks the uninformative ones more.
        # Harmless texts have no say in it: the ratio is to tell rude from polite, not one kind of text from another.
        counted = [
            sparse.vstack([rows[k], *(side[k] for pair in pairs for side in (pair.rude, pair.polite))]) for k in (0, 1)
        ]
        present = sum((block > 0).astype(np.float32) for block in counted)
        share = 1 / (1 + np.exp(-logits))
        as_toxic, as_clean = [share], [1 - share]
        for pair in pairs:
            for toxic_share in (0.9, 0.1):
                as_toxic.append(np.full(pair.rude[0].shape[0], pair.share * toxic_share))
                as_clean.append(np.full(pair.rude[0].shape[0], pair.share * (1 - toxic_share)))
        self.idf = np.log((1 + present.shape[0]) / (1 + np.asarray(present.sum(0)).ravel())) + 1
        toxic, clean = (present.T @ np.concatenate(part) + SMOOTHING for part in (as_toxic, as_clean))
        ratio = np.maximum(np.abs(np.log(toxic / toxic.sum() * clean.sum() / clean)), LEAST_RATIO)

        def features(blocks: list[Any]) -> Any:
            return (self._tf_idf(blocks) @ sparse.diags(ratio)).astype(np.float32).tocsr()

        # features, target, weight, side of the target that costs (0: both), whether the bias counts
        parts: list[tuple[Any, Any, float, int, int]] = [(features(rows), logits, 1.0, 0, 1)]
        parts += [(features(side.blocks), side.target, side.weight, 1 if side.below else -1, 1) for side in others]
        parts += [(features(pair.rude) - features(pair.polite), pair.margin, pair.weight, -1, 0) for pair in pairs]
        sizes = [part[0].shape[0] for part in parts]
        target = np.concatenate([np.broadcast_to(part[1], size) for part, size in zip(parts, sizes, strict=True)])
        cost = np.repeat([part[2] for part in parts], sizes)
        side = np.repeat([part[3] for part in parts], sizes)
        shifted = np.repeat([float(part[4]) for part in parts], sizes)
        matrix = sparse.vstack([part[0] for part in parts]).tocsr()
        used = np.flatnonzero(np.bincount(matrix.indices, minlength=matrix.shape[1]))
        matrix = matrix[:, used].tocsr()
        turned = matrix.T.tocsr()

        def loss(x: Floats) -> tuple[float, Floats]:
            error = matrix @ x[:-1].astype(np.float32) + x[-1] * shifted - target
            error = np.where((side == 0) | (side * error > 0), error, 0.0)
            pull = cost * error
            slope = turned @ pull.astype(np.float32) + RIDGE * x[:-1]
            value = 0.5 * float(pull @ error) + 0.5 * RIDGE * float(x[:-1] @ x[:-1])
            return value, np.append(slope, (pull * shifted).sum())

        start = np.append(np.zeros(len(used)), logits.mean())
        solution = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 60}).x
        self.bias = float(solution[-1])
        self.weight: Floats = np.zeros(len(ratio))
        self.weight[used] = solution[:-1] * ratio[used]

    def _tf_idf(self, blocks: list[Any]) -> Any:
        from scipy import sparse

        total = 0
        for block, floor in zip(blocks, FLOORS, strict=True):
            values = block.copy()
            values.data = 1 + np.log(values.data)
            values = values @ sparse.diags(self.idf)
            norms = np.sqrt(np.asarray(values.multiply(values).sum(1)).ravel())
            total = total + sparse.diags(1 / np.maximum(norms, floor)) @ values
        return total

    def predict(self, blocks: list[Any]) -> Floats:
        logits: Floats = self._tf_idf(blocks) @ self.weight + self.bias
        return logits


@dataclass(frozen=True)
class _Side:
    """Counted texts whose logit, before calibration, must stay below `target`, or else above it."""

    blocks: list[Any]
    target: float
    weight: float
    below: bool = True


@dataclass(frozen=True)
class _Pairs:
    """Counted rude texts, each of which must score `margin` above its polite counterpart."""

    rude: list[Any]
    polite: list[Any]
    margin: float
    weight: float
    share: float


def _count_blocks(texts: Sequence[str]) -> list[Any]:
    """Two sparse matrices [rows, buckets] of counts: words, character n-grams. Of a long text, the first window."""
    from scipy import sparse

    grams = [ngram_buckets((text_windows(normalised(text)) or [""])[0]) for text in texts]
    blocks = []
    for block in range(2):
        columns = np.concatenate([row[block] for row in grams])
        ends = np.cumsum([0] + [len(row[block]) for row in grams])
        shape = (len(texts), 2**BUCKET_BITS)
        matrix = sparse.csr_matrix((np.ones(len(columns)), columns, ends), shape=shape)
        matrix.sum_duplicates()
        blocks.append(matrix)
    return blocks


def train(
    data: Path, output: Path, evaluate_on: list[Path] | None = None, made_up: tuple[int, int] = (MADE_UP, INSULTS)
) -> EmbeddedScorer:
    """Fits a scorer, measures it, and writes weights and card into `output`; the same input gives the same weights.

    `data` is the folder of the texts, or the file of scored rows alone. `made_up`: how many harmless texts and insults
    are made up. Calibration (Platt's, on the scored rows held out of a first fit and on harmless sentences held out)
    makes .5 the score from which a text is more likely toxic than not. Each file is replaced at once, the card last;
    the card holds the hash of the weights, so a half-done pair does not load. Raises `DataError`.
    """
    from sklearn.linear_model import LogisticRegression

    file, folder = (data / RTP, data) if data.is_dir() else (data, data.parent)
    rows = read_scored_texts(file)
    evaluate_on = evaluate_on or []
    if len(np.unique(rows.group)) < FOLDS or not 0 < (rows.toxicity >= TOXIC_FROM).sum() < len(rows.texts):
        raise DataError(f"{file.name!r} needs at least {FOLDS} rows, toxic and non-toxic ones")
    rude, kind = contrasts(made_up[1], SEED)
    pairs = rude_and_polite(folder / PARADETOX) if data.is_dir() else []
    corpora = [text for texts in harmless_texts(folder).values() for text in texts] if data.is_dir() else []
    held = [text for texts in harmless_texts(folder, held_out=True).values() for text in texts] if corpora else kind
    said = [text for text, score in zip(rows.texts, rows.toxicity, strict=True) if score >= TOXIC_FROM]
    quiet = [text for text, score in zip(rows.texts, rows.toxicity, strict=True) if score < 0.3]
    words = vocabulary() if data.is_dir() else []
    words = ordinary(words, said + [a for a, _ in pairs], quiet + [b for _, b in pairs], rude)
    sides = [
        (clean_texts(made_up[0], SEED) + kind, -1.2, 0.2),
        (corpora + fragments(corpora, len(corpora) // 2, SEED), -1.0, 0.05),
        (words, -1.3, 0.3),
        (salads(words, len(words) * 4 // 5, SEED), -1.0, 0.2),
        ([*IDENTITY_WORDS, *GROUPS, *ONES], -1.0, 3.0),
    ]
    harmless = [text for texts, _, _ in sides for text in texts]
    others = [_Side(_count_blocks(texts), target, weight) for texts, target, weight in sides if texts]
    others.append(_Side(_count_blocks(rude), 1.6, 0.5, below=False))
    counted = [_Pairs(_count_blocks(rude), _count_blocks(kind), 2.0, 0.02, CONTRAST_SHARE)]
    if pairs:
        counted.append(
            _Pairs(_count_blocks([a for a, _ in pairs]), _count_blocks([b for _, b in pairs]), 2.0, 1.0, PAIR_SHARE)
        )
    clipped = np.clip(rows.toxicity, 0.02, 0.98)
    logits = np.log(clipped / (1 - clipped))
    blocks = _count_blocks(rows.texts)

    fold = np.random.default_rng(SEED).permutation(int(rows.group.max()) + 1)[rows.group] % FOLDS
    inside, outside = np.flatnonzero(fold != 0), np.flatnonzero(fold == 0)
    first = _Fit([block[inside] for block in blocks], logits[inside], others, counted)
    held_out = first.predict([block[outside] for block in blocks])
    seen = np.append(held_out, first.predict(_count_blocks(held)))
    toxic = np.append(rows.toxicity[outside] >= TOXIC_FROM, np.zeros(len(held), dtype=bool))
    stretch, shift = 1.0, 0.0
    if len(np.unique(toxic)) == 2:
        platt = LogisticRegression(C=1.0).fit(seen[:, None], toxic)
        stretch, shift = float(platt.coef_[0, 0]), float(platt.intercept_[0]) + math.log(ODDS)

    fit = _Fit(blocks, logits, others, counted)
    tensors: dict[str, npt.NDArray[Any]] = {
        "idf": fit.idf.astype(np.float16),
        "weight": (stretch * fit.weight).astype(np.float16),
        "bias": np.array([stretch * fit.bias + shift], dtype=np.float32),
        "floors": np.array(FLOORS, dtype=np.float32),
    }
    weights = safetensors.save(tensors)
    used = [
        file,
        *(folder / name for name in (PARADETOX, WIKITEXT, XQUAD) if data.is_dir() and (folder / name).is_file()),
    ]
    card: dict[str, Any] = {
        "name": "detox-guard embedded scorer",
        "method": "ridge on the logit of Perspective toxicity over TF-IDF of hashed words, pairs of words and "
        "characters 2-5; harmless texts, mild insults and polite rewritings as one-sided losses; Platt's calibration",
        "data": {
            "file": file.name,
            "files": {path.name: {"sha256": sha256_of(path), **SOURCES.get(path.name, {})} for path in used},
            "source": "RealToxicityPrompts (Gehman et al. 2020), texts with Perspective scores; ParaDetox (Logacheva "
            "et al. 2022); parts of WikiText-2 and XQuAD; made-up texts of detox_benchmarks.fitting.clean_texts",
            "licence": "Apache-2.0",
            "texts": len(rows.texts),
            "harmless": len(harmless),
            "mild_insults": len(rude),
            "pairs": len(pairs),
            "skipped_without_score": rows.skipped,
        },
        "command": " ".join(
            ["python -m detox_benchmarks fit linear", f"--data {data.name} --output {output.name}"]
            + [f"--evaluate {path.name}" for path in evaluate_on]
        ),
        "seed": SEED,
        "hyper_parameters": {
            "ridge": RIDGE, "smoothing": SMOOTHING, "least_ratio": LEAST_RATIO, "odds": ODDS,
            "buckets": 2**BUCKET_BITS, "floors": FLOORS,
        },
        "calibration": {"stretch": round(stretch, 4), "shift": round(shift, 4)},
        "weights_bytes": len(weights),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "held_out": _figures(rows.toxicity[outside], 1 / (1 + np.exp(-(stretch * held_out + shift)))),
        "cannot_see": LIMITS,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {
            name: importlib.metadata.version(name) for name in ("numpy", "scipy", "scikit-learn", "safetensors")
        }
        | {"python": platform.python_version()},
    }  # fmt: skip
    scorer = EmbeddedScorer(tensors["idf"], tensors["weight"], tensors["bias"].item(), FLOORS, card)
    card["evaluations"] = [evaluate(scorer, path) for path in evaluate_on]
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / WEIGHTS_FILE, weights)
    write_whole(output / CARD_FILE, json.dumps(card, indent=2, ensure_ascii=False) + "\n")
    return scorer


def fit(
    output: Path,
    data: Path | None = None,
    evaluate_on: list[Path] | None = None,
    made_up: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """`train` where there is data, else only measure what is in `output`; returns the figures. Raises `DataError`,
    `ScorerError`."""
    if data is None:
        scorer = EmbeddedScorer.load(output)
        return {"evaluations": [evaluate(scorer, path) for path in evaluate_on or []]}
    card = train(data, output, evaluate_on, made_up or (MADE_UP, INSULTS)).card
    return {key: card[key] for key in ("held_out", "evaluations", "weights_sha256")}
