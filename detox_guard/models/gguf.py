"""A GGUF that llama.cpp is to serve: what it is, what it may be called, and where Ollama keeps one.

Knows names, files and a trial in a process of its own (`gguf_probe`). Does not know: rows, decoding, transformers'
weights. Tokenizer and chat template come from the file by transformers, as for every other model.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from detox_guard._files import write_whole
from detox_guard.errors import (
    BackboneError,
    BackboneNotFoundError,
    DetoxGuardError,
    InvalidParamsError,
    UnsupportedBackboneError,
)
from detox_guard.models import gguf_probe
from detox_guard.models.cache import cache_dir

if TYPE_CHECKING:
    from detox_guard.models.backbone import Backbone

__all__ = [
    "OLLAMA",
    "GgufFacts",
    "GgufModel",
    "NoWeights",
    "as_backbone",
    "facts_of",
    "kept_tokenizer",
    "need_llamacpp",
    "ollama_file",
    "revision_of",
]

OLLAMA = "ollama:"
_TRIAL_S = 600
_MODEL_LAYER = "application/vnd.ollama.image.model"
_QUANTIZATION = re.compile(r"[.-](?:i1-)?(?:UD-)?(?:I?Q\d\w*|TQ\d\w*|MXFP4\w*|B?F16|F32|fp16|fp32)$", re.IGNORECASE)
"""How a file's name ends that says how its weights are rounded."""
_KNOWN_AS = {"smollm2-135m-8k-lc100k-mix1-ep2": "SmolLM2-135M-Instruct"}
"""Files whose own name is that of a training run."""


class GgufFacts(BaseModel):
    """What llama.cpp says of a file, and what a trial found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    description: str
    """Architecture, size and rounding, as llama.cpp has them: "llama 256M Q4_1"."""
    meta: dict[str, str]
    vocab_size: int
    hidden_size: int
    num_layers: int
    context: int
    """Positions it was trained for."""
    window: int | None
    """Its sliding attention window."""
    several_positions: bool
    """Its positions have several parts (M-RoPE), which virtual tokens cannot be given."""
    learned_positions: bool
    parameters: int
    end_ids: tuple[int, ...]
    embedding_factor: float | None
    """What a virtual token, as transformers takes it, is multiplied by. None: it cannot be served."""

    @property
    def positions(self) -> int:
        """Positions that are computed alike whatever a context's size: LongRoPE's factors change with that."""
        scaling = f"{self.architecture}.rope.scaling."
        original = self.meta.get(f"{scaling}original_context_length")
        grows = self.meta.get(f"{scaling}type") == "longrope" or self.architecture.startswith("phi3")
        return min(self.context, int(original)) if original and grows else self.context

    def names(self, file: str) -> tuple[str, ...]:
        """What the model may be called, besides its file's name."""
        meta = self.meta
        parts = [meta.get(f"general.{part}") for part in ("basename", "finetune", "size_label")]
        base, tune, size = parts
        made = ["-".join(part for part in order if part) for order in ((base, size, tune), (base, tune, size)) if base]
        plain = [_plain(name) for name in (_without_quantization(file), meta.get("general.name"), *made)]
        return tuple(dict.fromkeys(_KNOWN_AS.get(name, name) for name in plain if name))


@dataclass(frozen=True, eq=False)
class GgufModel:
    """A file that was tried, and how its user wants it served."""

    path: Path
    facts: GgufFacts
    how: dict[str, Any] = field(default_factory=dict)
    """Fields of `LoadOptions` that only llama.cpp takes."""


class NoWeights:
    """Stands for the torch model of a backbone that has none. Whatever is asked of it is a named error."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle look for these
            raise AttributeError(name)
        raise self._error()

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise self._error()

    def _error(self) -> UnsupportedBackboneError:
        return UnsupportedBackboneError(
            f"{self._name}: llama.cpp serves it, so torch has no weights of it",
            hint='leave out engine="llamacpp" for this: training and likelihoods need the torch engine',
        )


def need_llamacpp() -> None:
    """Raises `BackboneError` where llama-cpp-python is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise BackboneError(
            'engine="llamacpp" needs llama-cpp-python, which is not installed',
            hint='pip install "detox-guard[llamacpp]" compiles it (a C++ compiler, about 5 minutes on two cores); the '
            "project llama-cpp-python has an index of compiled wheels for CPU, CUDA and Metal; so has conda-forge.",
        )


def facts_of(path: Path) -> GgufFacts:
    """What a file is. The first time it is tried, in a process of its own, and the answer is kept in the cache.

    Raises `BackboneError` for a file that llama.cpp cannot load, `UnsupportedBackboneError` for a kind of model that
    cannot be steered.
    """
    need_llamacpp()
    kept = _kept(path, ".json")
    if kept is not None:
        with suppress(OSError, ValueError):
            return GgufFacts.model_validate_json(kept.read_text())
    said = _tried(path)
    if "error" in said:
        if said.get("served", True):
            raise BackboneError(f"{path}: {said['error']}", hint="The file may be damaged, incomplete, or too new.")
        raise UnsupportedBackboneError(f"{path.name} cannot be steered: {said['error']}")
    facts = GgufFacts(**said)
    if kept is not None:
        with suppress(OSError, DetoxGuardError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_whole(kept, facts.model_dump_json())
    return facts


def as_backbone(gguf: GgufModel, tokenizer: Any, name: str, revision: str, file: str | None = None) -> Backbone:
    """The backbone that llama.cpp serves. Raises `InvalidParamsError`, or `BackboneError` for another's tokenizer."""
    import torch
    from transformers import PreTrainedTokenizerBase

    from detox_guard.models.backbone import Backbone

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InvalidParamsError("tokenizer", tokenizer, "a name, a path, or a transformers tokenizer")
    facts, pad = gguf.facts, tokenizer.pad_token_id
    if max(tokenizer("The quick brown fox").input_ids, default=0) >= facts.vocab_size:
        raise BackboneError(f"{name}: wrong tokenizer: it gives ids past the vocabulary of {facts.vocab_size}")
    return Backbone(
        model=NoWeights(name),
        tokenizer=tokenizer,
        id=name,
        revision=revision,
        device=torch.device("cpu"),
        dtype=torch.float32,
        hidden_size=facts.hidden_size,
        num_layers=facts.num_layers,
        vocab_size=facts.vocab_size,
        max_positions=gguf.how.get("n_ctx") or facts.positions,
        learned_positions=facts.learned_positions,
        window=facts.window,
        eos_token_ids=facts.end_ids,
        pad_token_id=int(pad if pad is not None and pad < facts.vocab_size else next(iter(facts.end_ids), 0)),
        has_chat_template=bool(getattr(tokenizer, "chat_template", None)),
        quantization=facts.description,
        gguf=gguf,
        also_called=facts.names(gguf.path.name),
        file=file,
    )


def revision_of(path: Path) -> str:
    """A digest that tells a file from another of its name: of its size, its beginning and its end."""
    size, part = path.stat().st_size, 1 << 20
    with path.open("rb") as stream:
        digest = hashlib.sha256(str(size).encode() + stream.read(part))
        stream.seek(max(0, size - part))
        digest.update(stream.read(part))
    return f"gguf-{digest.hexdigest()[:12]}"


def ollama_file(name: str) -> Path:
    """The GGUF of an Ollama model: `ollama:llama3.2`, `ollama:org/name:tag`. Its Go template is not used.

    It is looked for where Ollama keeps models: `$OLLAMA_MODELS`, else the user's `.ollama` folder, else a Linux
    service's. Raises `BackboneNotFoundError`, `BackboneError`.
    """
    short, _, tag = name.removeprefix(OLLAMA).partition(":")
    parts = [part for part in short.split("/") if part]
    if not parts or len(parts) > 3 or any(part in (".", "..") for part in (*parts, tag)) or "/" in tag:
        raise BackboneNotFoundError(f"{name}: no name of an Ollama model", hint='as in "ollama:llama3.2"')
    host, space = "registry.ollama.ai", "library"
    where = {1: [host, space, *parts], 2: [host, *parts], 3: parts}[len(parts)]
    stores = [Path(own)] if (own := os.environ.get("OLLAMA_MODELS")) else [
        Path.home() / ".ollama" / "models", Path("/usr/share/ollama/.ollama/models"),
    ]  # fmt: skip
    for store in stores:
        manifest = store.joinpath("manifests", *where, tag or "latest")
        if manifest.is_file():
            return _blob(name, store, manifest)
    raise BackboneNotFoundError(
        f"{name}: no such Ollama model in {' or '.join(map(str, stores))}",
        hint=f"ollama pull {name.removeprefix(OLLAMA)}, or set OLLAMA_MODELS to where its models are.",
    )


def _blob(name: str, store: Path, manifest: Path) -> Path:
    try:
        layers = json.loads(manifest.read_text())["layers"]
        digests = [str(layer["digest"]) for layer in layers if layer["mediaType"] == _MODEL_LAYER]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BackboneError(f"{name}: its manifest cannot be read: {manifest}: {error}") from error
    if len(digests) != 1 or not re.fullmatch(r"sha256:[0-9a-f]{64}", digests[0]):
        raise BackboneError(f"{name}: its manifest names {len(digests)} models: {manifest}")
    file = store / "blobs" / digests[0].replace(":", "-")
    if not file.is_file():
        raise BackboneNotFoundError(f"{name}: its file is missing: {file}", hint="ollama pull fetches it again.")
    return file


def _tried(path: Path) -> dict[str, Any]:
    """What the trial says. Raises `BackboneError` where it died."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
    command = [sys.executable, "-P", gguf_probe.__file__, str(path)]
    try:
        done = subprocess.run(command, capture_output=True, env=env, timeout=_TRIAL_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackboneError(f"{path}: llama.cpp could not be tried: {error}") from error
    lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
    try:
        said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        why = f"it ended with status {done.returncode}" + (f": {lines[-1].strip()}" if lines else "")
        raise BackboneError(
            f"{path}: a trial of llama.cpp failed: {why}", hint="The file may be damaged or incomplete; fetch it again."
        ) from None
    if "error" in said and lines:
        said["error"] += f": {lines[0].strip()}"
    return said


def kept_tokenizer(path: Path) -> Path | None:
    """The folder in the cache for this file's tokenizer, as the installed transformers makes it."""
    from transformers import __version__

    return _kept(path, f"-tokenizer-{__version__}")


def _kept(path: Path, end: str) -> Path | None:
    """Where the answer for this file lies: another size, time or library is another place. None without a cache."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        library = version("llama-cpp-python")
    except PackageNotFoundError:
        return None
    with suppress(OSError, BackboneError):
        found, own = path.stat(), Path(gguf_probe.__file__).read_bytes()
        stamp = [str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, library]
        digest = hashlib.sha256(json.dumps(stamp).encode() + own).hexdigest()
        return cache_dir() / "gguf" / (digest[:24] + end)
    return None


def _without_quantization(file: str) -> str:
    return _QUANTIZATION.sub("", file.removesuffix(".gguf"))


def _plain(name: str | None) -> str:
    """As names of models are written on the hub."""
    return re.sub(r"\s+", "-", (name or "").strip()).lower()
