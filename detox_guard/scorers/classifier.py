"""Any Hugging Face text classifier as a scorer. Knows windows, labels and transformers; knows no weights of ours."""

from __future__ import annotations

import math
import re
import threading
from typing import TYPE_CHECKING, Any

from detox_guard._forking import native_work
from detox_guard.errors import ScorerError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["HuggingFaceScorer", "toxic_index"]


class HuggingFaceScorer:
    """Any Hugging Face text classifier, by hub id or folder, loaded at the first score.

    `label` names the toxic class; by default it is found by its name. Multi-label models are read through a sigmoid,
    others through a softmax. A text longer than the model is scored in overlapping windows and gets the worst. Code
    from the hub is never run, and weights that are not safetensors are refused. `score` raises `ScorerError` if the
    model cannot be loaded, or no label is surely the toxic one.
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

    def prepare(self) -> None:
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
            with native_work(), torch.inference_mode():
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
                self._loaded = model, tokenizer, toxic_index(model.config.id2label, self._label), max_tokens
            return self._loaded


def toxic_index(id2label: dict[int, str], wanted: str | None) -> int:
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
