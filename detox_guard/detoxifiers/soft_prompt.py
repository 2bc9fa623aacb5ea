"""The soft prompt: load, save, check against a backbone.

Knows PEFT's prompt-tuning folder (both ways) and what makes a soft prompt fit a backbone. Knows nothing of how one is
trained (`detox_guard.training`) or served (`detox_guard.engine`).
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import ValidationError

from detox_guard._files import read_regular, sync, usable_path
from detox_guard.detoxifiers.base import EmbeddingPrefix
from detox_guard.detoxifiers.card import DetoxifierCard
from detox_guard.detoxifiers.text_view import TextView
from detox_guard.errors import (
    DataError,
    DetoxifierError,
    DetoxifierFormatError,
    DetoxifierMismatchError,
    DetoxifierNotFoundError,
    InvalidParamsError,
)
from detox_guard.models.checks import CONFIG_FILE, NO_SOFT_PROMPT

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from detox_guard.detoxifiers.base import Place, View
    from detox_guard.detoxifiers.card import Position
    from detox_guard.models.backbone import Backbone

__all__ = ["Detoxifier", "Source", "SteeringStream", "last_part"]

WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "detoxifier_card.json"
TENSOR_KEY = "prompt_embeddings"
DEFAULT_FOLDER = Path(__file__).parents[1] / "assets" / "detoxifier"
_MOST_BYTES = 2**30


@dataclass(frozen=True, eq=False)
class Detoxifier:
    """A soft prompt: `embeddings` [virtual_tokens, hidden_size], float32 on the CPU, and its card.

    Raises `DetoxifierFormatError` when the tensor is of another shape than the card says, or not finite.
    """

    embeddings: torch.Tensor
    card: DetoxifierCard

    def __post_init__(self) -> None:
        shape = (self.card.virtual_tokens, self.card.hidden_size)
        if tuple(self.embeddings.shape) != shape:
            raise DetoxifierFormatError(
                f"{TENSOR_KEY}: the tensor is {tuple(self.embeddings.shape)}, its description says {shape}"
            )
        if not self.embeddings.is_floating_point():
            raise DetoxifierFormatError(f"{TENSOR_KEY}: {self.embeddings.dtype} is no floating type")
        tensor = self.embeddings.detach().float().cpu().contiguous()
        if not bool(tensor.isfinite().all()):
            raise DetoxifierFormatError(f"{TENSOR_KEY}: the tensor holds NaN or infinite values")
        object.__setattr__(self, "embeddings", tensor)

    @property
    def sha256(self) -> str:
        """Hex digest of the float32 bytes, row by row: equal for equal soft prompts, whatever their cards say."""
        return hashlib.sha256(self.embeddings.numpy().tobytes()).hexdigest()

    @property
    def place(self) -> Position:
        """Where its virtual tokens stand."""
        return self.card.position

    def identity(self) -> dict[str, Any]:
        """What it is, as JSON."""
        card = self.card
        return {"sha256": self.sha256, "position": card.position, "virtual_tokens": card.virtual_tokens}

    def view(self, backbone: Backbone, weight: float) -> EmbeddingPrefix:
        """What the engine serves."""
        return EmbeddingPrefix(self.embeddings, weight, self.card.position)

    @staticmethod
    def from_text(text: str, place: Place = "front", weight: float = -1.0, *, tail: int = 0) -> SteeringStream:
        """A text as a detoxifier: nothing is trained, and any model takes it.

        Toxic text, or words that announce it, with a negative weight; kind words with a positive one (an expert).
        `place` and `tail` as in `TextView`. Raises `InvalidParamsError`.
        """
        return SteeringStream(TextView(text, place, tail), weight)

    @classmethod
    def load(cls, source: str | os.PathLike[str] | None = None, *, revision: str | None = None) -> Self:
        """Read a folder, or a hub id, in PEFT's prompt-tuning format; safetensors only, nothing is ever unpickled.

        None is the shipped soft prompt, for the embedded default backbone. A folder without our card is taken as PEFT
        makes it: position "front", card from `adapter_config.json`.
        Raises `DetoxifierNotFoundError` and `DetoxifierFormatError`, the latter naming what is wrong.
        """
        folder = _find(DEFAULT_FOLDER if source is None else source, revision)
        config = _read_json(folder / CONFIG_FILE)
        card = _read_card(folder, config)
        return cls(_read_tensor(folder), card)

    def save(self, folder: str | Path) -> None:
        """Write `folder` so that `load` and PEFT's `PeftModel.from_pretrained` read the exact tensor back.

        `adapter_config.json` is what makes a folder loadable: it goes first and comes last, so that a process killed
        in between leaves the old detoxifier, none, or the new one, and never a mixture. Raises `DetoxifierError` where
        it cannot be written.
        """
        from peft import PromptTuningConfig
        from safetensors.torch import save

        folder = usable_path(folder, DetoxifierError)
        config = PromptTuningConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=self.card.base_id,
            num_virtual_tokens=self.card.virtual_tokens,
            token_dim=self.card.hidden_size,
            num_layers=self.card.num_layers,
            num_transformer_submodules=1,
            inference_mode=True,
        ).to_dict()
        files = {
            WEIGHTS_FILE: save({TENSOR_KEY: self.embeddings}, metadata={"format": "pt"}),
            CARD_FILE: (self.card.model_dump_json(indent=2) + "\n").encode(),
            CONFIG_FILE: (json.dumps(config, indent=2, sort_keys=True, default=_plain) + "\n").encode(),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                (folder / f".{name}.new").write_bytes(content)
                sync(folder / f".{name}.new")
            (folder / CONFIG_FILE).unlink(missing_ok=True)
            for name in files:
                os.replace(folder / f".{name}.new", folder / name)
            sync(folder)
        except OSError as error:
            raise DetoxifierError(f"{folder}: cannot be written: {error}") from error

    def validate(self, backbone: Backbone) -> None:
        """Raise `DetoxifierMismatchError` unless this soft prompt was made for `backbone` and fits into it."""
        card = self.card
        # under a LoRA adapter: its base
        fits = {last_part(name) for name in (backbone.id, backbone.base_id, *backbone.also_called) if name}
        if card.base_id and last_part(card.base_id) not in fits:
            raise DetoxifierMismatchError(
                f"the detoxifier was trained for {card.base_id!r}, the backbone is {backbone.id!r}",
                hint="make one for this model: detox-guard adapt MODEL",
            )
        for name, ours, theirs in (
            ("hidden size", card.hidden_size, backbone.hidden_size),
            ("number of layers", card.num_layers, backbone.num_layers),
        ):
            if ours is not None and ours != theirs:
                raise DetoxifierMismatchError(f"{name}: {ours} in the detoxifier, {theirs} in {backbone.id!r}")
        if not bool(self.embeddings.to(backbone.dtype).isfinite().all()):
            raise DetoxifierMismatchError(f"{TENSOR_KEY}: some values are too large for {backbone.dtype}")
        if backbone.max_positions is not None and card.virtual_tokens >= backbone.max_positions:
            raise DetoxifierMismatchError(
                f"{card.virtual_tokens} virtual tokens leave no room in the {backbone.max_positions} positions "
                f"of {backbone.id!r}"
            )


Source = Literal["given", "shipped", "trained here", "untrained"]


@dataclass(frozen=True)
class SteeringStream:
    """One detoxifier and its signed weight: negative pushes away from it (an anti-expert, the paper's method),
    positive pulls towards it (an expert). Raises `InvalidParamsError` unless its size is from .001 to 1,000."""

    detoxifier: Detoxifier | TextView
    weight: float = -1.0
    source: Source = "given"
    """Who chose it: you, or `detoxifier="auto"`, and then what that found."""

    def __post_init__(self) -> None:
        if not isinstance(self.detoxifier, Detoxifier | TextView):
            raise InvalidParamsError("detoxifier", self.detoxifier, "a Detoxifier or a TextView")
        number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        if not number or not 1e-3 <= abs(self.weight) <= 1e3:
            raise InvalidParamsError("weight", self.weight, "a finite number other than 0, its size from .001 to 1,000")

    @property
    def place(self) -> Place:
        """Where its tokens stand."""
        return self.detoxifier.place

    @property
    def id(self) -> str:
        """Sign and weight, "text" where it is one, and the start of its SHA-256."""
        kind = "text:" if isinstance(self.detoxifier, TextView) else ""
        return f"{self.weight:+g}:{kind}{self.detoxifier.sha256[:12]}"

    @property
    def soft_prompt(self) -> Detoxifier:
        """For what can be told of virtual tokens only. Raises `DetoxifierError` for a text."""
        if isinstance(self.detoxifier, Detoxifier):
            return self.detoxifier
        raise DetoxifierError("a text has no virtual tokens", hint="name a trained detoxifier")

    def identity(self) -> dict[str, Any]:
        """What it is, as JSON, without who chose it."""
        return {**self.detoxifier.identity(), "weight": self.weight}

    def __str__(self) -> str:
        """For people: `a text of place "front", weight -1 (untrained)`."""
        what = "a text" if isinstance(self.detoxifier, TextView) else "a soft prompt"
        return f'{what} of place "{self.place}", weight {self.weight:+g} ({self.source}, {self.id})'

    def view(self, backbone: Backbone) -> View:
        """What the engine serves."""
        return self.detoxifier.view(backbone, self.weight)


def last_part(model_id: str) -> str:
    """`org/Name`, `/a/folder/Name/` → `name`: a hub id and a local copy of it are the same base."""
    return model_id.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()


def _plain(value: object) -> str | list[str]:
    """JSON for what PEFT keeps in its config besides plain values: enums and sets."""
    return sorted(value) if isinstance(value, set | frozenset) else str(getattr(value, "value", value))


def _shown(value: object) -> str:
    """A value out of a file, in a message."""
    try:
        text = repr(value)
    except RecursionError:
        text = "something nested too deep"
    return text if len(text) <= 80 else f"{text[:79]}…"


def _find(source: str | os.PathLike[str], revision: str | None) -> Path:
    """The local folder of a folder or hub id, fetched (only the files we read) unless the hub is offline."""
    folder = usable_path(source, DetoxifierNotFoundError)
    if not folder.exists():
        if not isinstance(source, str) or source.count("/") != 1 or source.startswith(("/", ".", "~")):
            raise DetoxifierNotFoundError(f"{source}: no such folder", hint="a folder, or a hub id: org/name")
        folder = _fetch(source, revision)
    if not folder.is_dir():
        raise DetoxifierFormatError(f"{source}: not a folder")
    if not os.path.lexists(folder / CONFIG_FILE):
        raise DetoxifierFormatError(f"{source}: no {CONFIG_FILE} in it", hint="was its training cut off?")
    return folder


def _fetch(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        names = [CONFIG_FILE, WEIGHTS_FILE, CARD_FILE]
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=names))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DetoxifierNotFoundError(
            f"{repo_id}: no such folder, and not on the hub: {error}",
            hint="a folder made by `detox-guard adapt`, `train` or PEFT, or a hub id that can be reached or is cached",
        ) from error


def _read(path: Path) -> bytes:
    """A file of a detoxifier. It must be one: whoever sends us a folder shall not make us read a pipe for ever, or a
    file of ours. Only the links of the hub's own cache, into its store of files, are followed."""
    if path.is_symlink():
        stored = path.resolve()
        if stored.parent == path.parent.parent.parent.resolve() / "blobs":
            path = stored
    try:
        return read_regular(path, _MOST_BYTES)
    except DataError as error:
        raise DetoxifierFormatError(str(error)) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise DetoxifierFormatError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DetoxifierFormatError(f"{path}: not a JSON object")
    return value


def _read_card(folder: Path, config: Mapping[str, Any]) -> DetoxifierCard:
    """Our card, checked against PEFT's config; or one made from that config."""
    for name, wanted in (("peft_type", "PROMPT_TUNING"), ("task_type", "CAUSAL_LM"), ("num_transformer_submodules", 1)):
        if config.get(name) != wanted:
            raise DetoxifierFormatError(
                f"{folder / CONFIG_FILE}: {name} is {_shown(config.get(name))}, not {wanted!r}",
                hint="" if config.get("peft_type") == "PROMPT_TUNING" else NO_SOFT_PROMPT,
            )
    stated: dict[str, Any] = {
        "base_id": config.get("base_model_name_or_path") or "",
        "hidden_size": config.get("token_dim"),
        "num_layers": config.get("num_layers"),
        "virtual_tokens": config.get("num_virtual_tokens"),
    }
    path = folder / (CARD_FILE if os.path.lexists(folder / CARD_FILE) else CONFIG_FILE)
    try:
        if path.name == CONFIG_FILE:
            if (folder / "trainer_state.json").exists():
                raise DetoxifierFormatError(
                    f"{folder}: a checkpoint of a training", hint="finish it, then take its output"
                )
            return DetoxifierCard(
                **stated, base_revision=config.get("revision"), initial_text=config.get("prompt_tuning_init_text")
            )
        card = DetoxifierCard.model_validate(_read_json(path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DetoxifierFormatError(f"{path}: {where}: {first['msg']}") from None
    for name, value in stated.items():
        if getattr(card, name) != value:
            given = f"{getattr(card, name)!r}, but {_shown(value)} in {CONFIG_FILE}"
            raise DetoxifierFormatError(f"{path}: {name} is {given}")
    return card


def _read_tensor(folder: Path) -> torch.Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = folder / WEIGHTS_FILE
    if not os.path.lexists(path):
        pickled = (folder / "adapter_model.bin").exists()
        raise DetoxifierFormatError(
            f"{folder}: no {WEIGHTS_FILE}" + (", only a pickled adapter_model.bin, which is not opened" * pickled),
            hint="save it again with safetensors: PeftModel.save_pretrained(…)" if pickled else "",
        )
    try:
        tensors = load(_read(path))
    except (SafetensorError, ValueError) as error:
        raise DetoxifierFormatError(f"{path}: not readable as safetensors: {error}") from error
    if set(tensors) != {TENSOR_KEY}:
        raise DetoxifierFormatError(f"{path}: holds {sorted(tensors)}, not just {TENSOR_KEY!r}")
    tensor: torch.Tensor = tensors[TENSOR_KEY]
    return tensor
