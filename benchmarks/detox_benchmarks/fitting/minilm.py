"""Fits the adapter and the head of the minilm scorer: low-rank updates of every linear layer of MiniLM, on the CPU.

Knows the texts that the linear scorer was trained on. Needs the linear scorer's asset, and scikit-learn::

    python -m detox_benchmarks fit minilm --data FOLDER --output FOLDER
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import random
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import numpy as safetensors
from torch import nn

from detox_benchmarks.fitting.clean_texts import clean_texts, contrasts
from detox_benchmarks.fitting.linear import SEED
from detox_benchmarks.fitting.texts import (
    PARADETOX,
    RTP,
    SOURCES,
    fragments,
    harmless_texts,
    read_scored_texts,
    rude_and_polite,
    sha256_of,
)
from detox_guard._files import write_whole
from detox_guard.scorers.base import TOXIC_FROM
from detox_guard.scorers.disguise import normalised
from detox_guard.scorers.linear import CARD_FILE, WEIGHTS_FILE, EmbeddedScorer
from detox_guard.scorers.minilm import LINEAR_BOUND, LINEAR_SHARE, LORA_SCALE, linear_layers, load_encoder, pooled

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["train"]

RANK, HIDDEN = 8, 64
BATCH, RATE, MAX_TOKENS = 32, 1.5e-3, 40
HELD = 10
"""Every tenth row of the scored texts is held out, to calibrate on."""


class _Adapted(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.A = nn.Parameter(torch.randn(RANK, layer.in_features) / layer.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(layer.out_features, RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x) + (x @ self.A.T) @ self.B.T * LORA_SCALE
        return out


class _Net(nn.Module):
    """Two answers a text: Perspective's toxicity, and rude or polite as ParaDetox means it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.adapters = {}
        for name, layer in linear_layers(model).items():
            parent, _, last = name.rpartition(".")
            self.adapters[name] = _Adapted(layer)
            setattr(model.get_submodule(parent), last, self.adapters[name])
        self.head, self.out, self.skip = nn.Linear(768, HIDDEN), nn.Linear(HIDDEN, 2), nn.Linear(768, 1)

    def forward(self, batch: Any) -> torch.Tensor:
        features = pooled(self.model, batch)
        out: torch.Tensor = self.out(torch.relu(self.head(features))) + self.skip(features)
        return out


def train(data: Path, output: Path, epochs: int = 2, size: float = 1.0) -> None:
    """Writes weights and card into `output`. `size` scales the made-up and paired texts. Raises `DataError`."""
    from sklearn.linear_model import LogisticRegression

    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    rows = read_scored_texts(data / RTP)
    held = rows.group % HELD == 0
    texts = [text for text, out in zip(rows.texts, held, strict=True) if not out]
    target, task, weight = list(rows.toxicity[~held]), [0] * len(texts), [1.0] * len(texts)

    def add(more: list[str], value: float, which: int, much: float) -> None:
        texts.extend(more)
        target.extend([value] * len(more))
        task.extend([which] * len(more))
        weight.extend([much] * len(more))

    rude, kind = contrasts(int(700 * size), SEED)
    corpora = [text for found in harmless_texts(data).values() for text in found]
    add(clean_texts(int(2500 * size), SEED) + kind, 0.03, 0, 0.6)
    add(
        fragments(corpora, int(800 * size), SEED) + rng.sample(corpora, min(int(500 * size), len(corpora))),
        0.03,
        0,
        0.6,
    )
    add(rude, 0.9, 0, 0.6)
    pairs = rng.sample(rude_and_polite(data / PARADETOX), int(1500 * size))
    add([toxic for toxic, _ in pairs], 0.9, 1, 0.4)
    add([polite for _, polite in pairs], 0.1, 1, 0.4)

    model, tokenizer = load_encoder()
    net = _Net(model)
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01)
    steps = math.ceil(len(texts) / BATCH) * epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / (0.06 * steps)) * max(0.02, 1 - i / steps)
    )
    ids = tokenizer([normalised(text) for text in texts], truncation=True, max_length=MAX_TOKENS)["input_ids"]
    wanted, which, much = torch.tensor(target).float(), torch.tensor(task), torch.tensor(weight)
    done = 0
    for _ in range(epochs):
        order = list(range(len(ids)))
        rng.shuffle(order)
        chunks = [
            sorted(order[i : i + 50 * BATCH], key=lambda j: len(ids[j])) for i in range(0, len(order), 50 * BATCH)
        ]
        batches = [chunk[i : i + BATCH] for chunk in chunks for i in range(0, len(chunk), BATCH)]
        rng.shuffle(batches)
        for part in batches:
            batch = tokenizer.pad({"input_ids": [ids[j] for j in part]}, return_tensors="pt")
            at = torch.tensor(part)
            with torch.autocast("cpu", torch.bfloat16):
                answers = net(batch).float()
            chosen = answers[torch.arange(len(part)), which[at]]
            losses = nn.functional.binary_cross_entropy_with_logits(chosen, wanted[at], reduction="none")
            loss = (much[at] * losses).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            done += 1
            if done % 50 == 0:
                print(f"step {done} of {steps}: loss {float(loss.detach()):.3f}", file=sys.stderr, flush=True)

    linear = EmbeddedScorer.load()
    clean = [text for found in harmless_texts(data, held_out=True).values() for text in found]
    clean = rng.sample(clean, min(len(clean), 600))
    seen = [normalised(text) for text in [t for t, out in zip(rows.texts, held, strict=True) if out] + clean]
    toxic = np.append(rows.toxicity[held] >= TOXIC_FROM, np.zeros(len(clean), dtype=bool))
    net.eval()
    logits = []
    with torch.inference_mode():
        for text in seen:
            batch = tokenizer([text], truncation=True, max_length=128, return_tensors="pt")
            batch.pop("token_type_ids", None)
            mixed = float(net(batch)[0, 0])
            logits.append(mixed + LINEAR_SHARE * min(max(linear.raw_logit(text), -LINEAR_BOUND), LINEAR_BOUND))
    platt = LogisticRegression().fit(np.array(logits)[:, None], toxic)
    tensors = {f"{name}.{part}": getattr(layer, part) for name, layer in net.adapters.items() for part in "AB"}
    tensors |= {
        f"{part}.{name}": value
        for part in ("head", "out", "skip")
        for name, value in getattr(net, part).named_parameters()
    }
    arrays: dict[str, Any] = {name: value.detach().numpy().astype(np.float16) for name, value in tensors.items()}
    arrays["calibration"] = np.array([platt.coef_[0, 0], platt.intercept_[0]], dtype=np.float32)
    weights = safetensors.save(arrays)
    card = {
        "name": "detox-guard minilm scorer",
        "method": "low-rank adapter over all-MiniLM-L6-v2 (Apache-2.0), head on mean and maximum of its last states, "
        "and the linear scorer's logit; Platt's calibration on rows held out",
        "data": {
            name.rpartition("/")[2]: {"sha256": sha256_of(data / name), **SOURCES.get(name.rpartition("/")[2], {})}
            for name in (RTP, PARADETOX)
        },
        "command": f"python -m detox_benchmarks fit minilm --data {data.name} --output {output.name}",
        "seed": SEED,
        "hyper_parameters": {"rank": RANK, "epochs": epochs, "batch": BATCH, "rate": RATE, "texts": len(texts)},
        "weights_bytes": len(weights),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "linear_scorer": linear.fingerprint,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / WEIGHTS_FILE, weights)
    write_whole(output / CARD_FILE, json.dumps(card, indent=2) + "\n")
