"""Backbones of real sizes with random weights, in memory or as files, to time decoding where no hub can be reached.

Knows the shapes of some Llama models; how long a step takes does not depend on the numbers in it. They say noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from detox_benchmarks.speed.gguf_files import write_gguf
from detox_guard.errors import InvalidParamsError
from detox_guard.models.backbone import Backbone, from_model, pick_device, pick_dtype
from detox_guard.models.load import load_backbone

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["PREFIX", "SHAPES", "random_backbone", "write_random"]

PREFIX = "random-llama:"
# hidden, intermediate, layers, heads, key/value heads, vocabulary, head tied to the embeddings
SHAPES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "tiny": (48, 64, 2, 6, 2, 512, True),
    "135m": (576, 1536, 30, 9, 3, 49_152, True),  # SmolLM2-135M
    "1b": (2048, 8192, 16, 32, 8, 128_256, True),  # Llama-3.2-1B
    "8b": (4096, 14_336, 32, 32, 8, 128_256, False),  # Llama-3.1-8B
}


def random_backbone(
    name: str, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None, seed: int = 0
) -> Backbone:
    """A Llama of the shape `name` ("random-llama:8b"), its weights drawn on `device` by `seed`.

    Its tokenizer splits at spaces and knows the words "w0", "w1", … Raises `InvalidParamsError`.
    """
    on = pick_device(device)
    model = _random_model(name, on, pick_dtype(dtype, on), seed)
    return from_model(model, _tokenizer(model.config.vocab_size), id=name)


def write_random(name: str, folder: Path, *, rounded: str = "Q4_0", seed: int = 0) -> Path:
    """Save such a model as transformers does, in bfloat16, with the embedded default's tokenizer; and the same weights
    for llama.cpp in the file "model-`rounded`.gguf" beside them, which is returned. Raises `InvalidParamsError`, also
    for a vocabulary smaller than that tokenizer's."""
    model = _random_model(name, torch.device("cpu"), torch.bfloat16, seed)
    tokenizer = load_backbone().tokenizer
    if (size := model.config.vocab_size) < len(tokenizer):
        raise InvalidParamsError("shape", name, f"a vocabulary of at least {len(tokenizer)}, not {size}")
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / f"model-{rounded}.gguf"
    write_gguf(file, model, tokenizer, name=folder.name, rounded=rounded)
    return file


def _random_model(name: str, on: torch.device, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES.get(name.removeprefix(PREFIX))
    if shape is None:
        raise InvalidParamsError("model", name, f"one of {', '.join(PREFIX + known for known in SHAPES)}")
    hidden, intermediate, layers, heads, kv_heads, vocab, tied = shape
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    wanted = torch.get_default_dtype()
    devices = [on] if on.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(on):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            model: PreTrainedModel = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(wanted)
    return model


def _tokenizer(vocab: int) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words: dict[str, int] = {"<pad>": 0, "<end>": 1, **{f"w{i}": i for i in range(2, vocab)}}
    tokenizer: Any = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", clean_up_tokenization_spaces=False
    )
    return fast
