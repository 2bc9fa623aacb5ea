"""Fits the embedded scorer: ridge on the logit of Perspective toxicity, over hashed TF-IDF features.

Knows the RealToxicityPrompts rows, the fit, the calibration, the card and how a scorer is measured. The features and
the formula of the score are `detox_guard.scoring`'s. Needs scipy and scikit-learn (the `dev` extra)::

    python -m detox_guard.training.scorer --data TRAIN.jsonl --output FOLDER [--evaluate FILE ...]
    python -m detox_guard.training.scorer --output FOLDER --evaluate FILE ...        # measure only
"""

from __future__ import annotations

import argparse
import csv
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import numpy as safetensors

from detox_guard.errors import DataError, DetoxGuardError
from detox_guard.scoring import (
    BUCKET_BITS,
    CARD_FILE,
    WEIGHTS_FILE,
    EmbeddedScorer,
    Floats,
    ngram_buckets,
    text_windows,
)

__all__ = ["ScoredTexts", "evaluate", "main", "read_scored_texts", "train"]

SEED, FOLDS = 0, 4
RIDGE = 0.5  # λ; from cross-validation on the training rows, as are the n-grams and the smoothing
SMOOTHING = 1.0
LIMITS = [
    "implicit hate and anything that is toxic only in its context: near chance",
    "languages other than English",
    "mentions of identity groups score too high, quoted or reclaimed words likewise",
    "trained on short web text scored by Perspective, whose own errors and biases it inherits",
]


@dataclass(frozen=True)
class ScoredTexts:
    """`toxicity[i]` in [0, 1] of `texts[i]`; rows of one `group` come from one document. `skipped` had no score."""

    texts: list[str]
    toxicity: Floats
    group: npt.NDArray[np.int64]
    skipped: int


def read_scored_texts(path: Path) -> ScoredTexts:
    """RealToxicityPrompts JSONL (prompt and continuation apart), or a CSV with the columns `comment` and `toxic`.

    Raises `DataError` for a missing, empty or unreadable file.
    """
    texts: list[str] = []
    toxicity: list[float] = []
    group: list[int] = []
    skipped = 0
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows: Any = csv.DictReader(file) if path.suffix == ".csv" else map(json.loads, filter(str.strip, file))
            for number, row in enumerate(rows):
                if path.suffix == ".csv":
                    pairs = [(row["comment"], {"true": 1.0, "false": 0.0}[row["toxic"].lower()])]
                else:
                    pairs = [(row[part]["text"], row[part].get("toxicity")) for part in ("prompt", "continuation")]
                for text, score in pairs:
                    if score is None:
                        skipped += 1
                        continue
                    if not isinstance(text, str) or not 0.0 <= float(score) <= 1.0:
                        raise ValueError(f"row {number}: {score!r} is no toxicity of a text")
                    texts.append(text)
                    toxicity.append(float(score))
                    group.append(number)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise DataError(f"cannot read {path.name!r}: {type(error).__name__}: {error}") from error
    if not texts:
        raise DataError(f"{path.name!r} holds no scored text ({skipped} rows without a score)")
    return ScoredTexts(texts, np.array(toxicity), np.array(group), skipped)


def evaluate(scorer: EmbeddedScorer, path: Path) -> dict[str, Any]:
    """ROC-AUC for toxicity ≥ .5 on one file, and how many of its rows are, and are scored, ≥ .5. Raises `DataError`."""
    rows = read_scored_texts(path)
    scores = np.array(scorer.score(rows.texts))
    return {"file": path.name, "sha256": _sha256(path), **_figures(rows.toxicity, scores), "skipped": rows.skipped}


def _figures(toxicity: Floats, scores: Floats) -> dict[str, Any]:
    from sklearn.metrics import roc_auc_score

    toxic = toxicity >= 0.5
    auc = round(float(roc_auc_score(toxic, scores)), 4) if 0 < toxic.sum() < len(toxic) else None
    return {"rows": len(toxic), "toxic": int(toxic.sum()), "scored_toxic": int((scores >= 0.5).sum()), "roc_auc": auc}


class _Fit:
    """idf, weight and bias of a ridge fitted to some rows; `predict` gives logits."""

    def __init__(self, blocks: list[Any], logits: Floats) -> None:
        from scipy import sparse
        from scipy.sparse.linalg import lsqr

        present = sum((block > 0).astype(np.float64) for block in blocks)
        self.idf = np.log((1 + len(logits)) / (1 + np.asarray(present.sum(0)).ravel())) + 1
        # Scaling each feature by its log-count ratio (NB-SVM, Wang & Manning 2012) shrinks the uninformative ones more.
        share = 1 / (1 + np.exp(-logits))
        toxic, clean = present.T @ share + SMOOTHING, present.T @ (1 - share) + SMOOTHING
        ratio = np.abs(np.log(toxic / toxic.sum() * clean.sum() / clean))
        features = self._tf_idf(blocks) @ sparse.diags(ratio)
        self.bias = float(logits.mean())
        solution = lsqr(features, logits - self.bias, damp=RIDGE**0.5, atol=1e-5, btol=1e-5, iter_lim=200)[0]
        self.weight: Floats = solution * ratio

    def _tf_idf(self, blocks: list[Any]) -> Any:
        from scipy import sparse

        total = 0
        for block in blocks:
            values = block.copy()
            values.data = 1 + np.log(values.data)
            values = values @ sparse.diags(self.idf)
            norms = np.sqrt(np.asarray(values.multiply(values).sum(1)).ravel())
            total = total + sparse.diags(1 / np.maximum(norms, 1e-12)) @ values
        return total

    def predict(self, blocks: list[Any]) -> Floats:
        logits: Floats = self._tf_idf(blocks) @ self.weight + self.bias
        return logits


def _count_blocks(texts: list[str]) -> list[Any]:
    """Two sparse matrices [rows, buckets] of counts: words, character n-grams. Of a long text, the first window."""
    from scipy import sparse

    grams = [ngram_buckets((text_windows(text) or [""])[0]) for text in texts]
    blocks = []
    for block in range(2):
        columns = np.concatenate([row[block] for row in grams])
        ends = np.cumsum([0] + [len(row[block]) for row in grams])
        shape = (len(texts), 2**BUCKET_BITS)
        matrix = sparse.csr_matrix((np.ones(len(columns)), columns, ends), shape=shape)
        matrix.sum_duplicates()
        blocks.append(matrix)
    return blocks


def train(data: Path, output: Path, evaluate_on: list[Path] | None = None) -> EmbeddedScorer:
    """Fits a scorer, measures it, and writes weights and card into `output`; the same input gives the same weights.

    The logits are stretched to the spread of Perspective's and shifted until as many rows held out in
    cross-validation score ≥ .5 as Perspective put there. Each file is replaced at once, the card last; the card holds
    the hash of the weights, so a half-done pair does not load. Raises `DataError`.
    """
    rows = read_scored_texts(data)
    evaluate_on = evaluate_on or []
    if len(np.unique(rows.group)) < FOLDS or not 0 < (rows.toxicity >= 0.5).sum() < len(rows.texts):
        raise DataError(f"{data.name!r} needs at least {FOLDS} rows, toxic and non-toxic ones")
    clipped = np.clip(rows.toxicity, 0.005, 0.995)
    logits = np.log(clipped / (1 - clipped))
    blocks = _count_blocks(rows.texts)

    held_out = np.zeros(len(logits))
    fold = np.random.default_rng(SEED).permutation(int(rows.group.max()) + 1)[rows.group] % FOLDS
    for number in range(FOLDS):
        inside, outside = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        fit = _Fit([block[inside] for block in blocks], logits[inside])
        held_out[outside] = fit.predict([block[outside] for block in blocks])
    stretch = float(logits.std() / max(held_out.std(), 1e-6))
    shift = -stretch * float(np.quantile(held_out, float((rows.toxicity < 0.5).mean())))

    fit = _Fit(blocks, logits)
    tensors: dict[str, npt.NDArray[Any]] = {
        "idf": fit.idf.astype(np.float16),
        "weight": (stretch * fit.weight).astype(np.float16),
        "bias": np.array([stretch * fit.bias + shift], dtype=np.float32),
    }
    weights = safetensors.save(tensors)
    card: dict[str, Any] = {
        "name": "detox-guard embedded scorer",
        "method": "ridge on the logit of Perspective toxicity over TF-IDF of hashed words and characters 2-5",
        "data": {
            "file": data.name,
            "sha256": _sha256(data),
            "source": "RealToxicityPrompts (Gehman et al. 2020), texts with Perspective scores",
            "licence": "Apache-2.0",
            "texts": len(rows.texts),
            "skipped_without_score": rows.skipped,
        },
        "command": " ".join(
            ["python -m detox_guard.training.scorer", f"--data {data.name} --output {output.name}"]
            + [f"--evaluate {path.name}" for path in evaluate_on]
        ),
        "seed": SEED,
        "hyper_parameters": {"ridge": RIDGE, "smoothing": SMOOTHING, "buckets": 2**BUCKET_BITS, "folds": FOLDS},
        "calibration": {"stretch": round(stretch, 4), "shift": round(shift, 4)},
        "weights_bytes": len(weights),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "cross_validation": _figures(rows.toxicity, 1 / (1 + np.exp(-(stretch * held_out + shift)))),
        "cannot_see": LIMITS,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {
            name: importlib.metadata.version(name) for name in ("numpy", "scipy", "scikit-learn", "safetensors")
        }
        | {"python": platform.python_version()},
    }
    scorer = EmbeddedScorer(tensors["idf"], tensors["weight"], tensors["bias"].item(), card)
    card["evaluations"] = [evaluate(scorer, path) for path in evaluate_on]
    output.mkdir(parents=True, exist_ok=True)
    _replace(output / WEIGHTS_FILE, weights)
    _replace(output / CARD_FILE, (json.dumps(card, indent=2, ensure_ascii=False) + "\n").encode())
    return scorer


def _replace(path: Path, content: bytes) -> None:
    """Writes a temporary neighbour, then renames it over `path`."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """The command line; prints the figures as JSON. 0 on success, 1 with a message for an error we know."""
    parser = argparse.ArgumentParser(prog="python -m detox_guard.training.scorer", description="Fit the scorer.")
    parser.add_argument("--data", type=Path, help="training rows (RealToxicityPrompts JSONL); absent: only evaluate")
    parser.add_argument("--output", type=Path, required=True, help="folder of the weights and the card")
    parser.add_argument("--evaluate", type=Path, action="append", default=[], metavar="FILE", help="may be repeated")
    options = parser.parse_args(arguments)
    try:
        if options.data is not None:
            card = train(options.data, options.output, options.evaluate).card
            report = {key: card[key] for key in ("cross_validation", "evaluations", "weights_sha256")}
        else:
            scorer = EmbeddedScorer.load(options.output)
            report = {"evaluations": [evaluate(scorer, path) for path in options.evaluate]}
    except DetoxGuardError as error:
        print(f"error: {error} {error.hint}".rstrip(), file=sys.stderr)
        return 1
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
