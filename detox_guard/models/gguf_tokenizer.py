"""The tokenizer of a GGUF file, made by transformers once and kept in the cache.

Knows files and transformers' ways to read a tokenizer. To make one out of a GGUF takes seconds, and brings in all that
transformers needs for a model: 125 MB that a process which decodes with llama.cpp has no use for.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["read_saved", "tokenizer_of"]


def tokenizer_of(path: Path, kept: Path | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a file, from the folder `kept`, else made and put there. None keeps nothing.

    Raises what transformers raises for a file whose tokenizer it does not know.
    """
    from transformers import AutoTokenizer

    if kept is not None and kept.is_dir():
        with suppress(OSError, ValueError, LookupError):
            return read_saved(kept)
    made: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if kept is not None:
        with suppress(OSError):  # a cache that cannot be written, or another process that was faster
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
                folder = Path(scratch) / "tokenizer"
                made.save_pretrained(folder)
                os.replace(folder, kept)
    return made


def read_saved(folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer that was saved with its class's name, read without the config of its model."""
    from transformers import AutoTokenizer, PreTrainedConfig

    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, config=PreTrainedConfig(), local_files_only=True
    )
    return found
