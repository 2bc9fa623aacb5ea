"""Tiny random backbones with a real byte-level tokenizer, made in memory in milliseconds.

Any text round-trips through the tokenizer. The weights are seeded and large, so that next-token distributions are
peaked and differ by context: a test that mixes up rows or positions does not pass by chance.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from detox_guard.models.backbone import Backbone, from_model

Kind = Literal["gpt2", "gpt2-no-pad", "llama", "mistral"]

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and then it sleeps in the sun.",
    "So, I'm starting to think she's full of kind and gentle words for all of us.",
    "You are a helpful assistant. Answer the question with the passages below.",
    "What a stupid idea! They said that nobody here would ever listen to him.",
    "Café naïve über straße – «quoted» … 1234567890",
    "今天天气很好，我们去公园散步吧。日本語の文章もあります。",
    "I ❤️ this 😀🎉👩‍👩‍👧 so much! ¿Qué tal? Привет, мир.",
]
TEXTS = [
    f"{who} {what}, {end}"
    for who in ("The mayor", "My neighbour", "This team", "Their plan", "That article")
    for what in ("is a complete mess", "makes no sense at all", "was never any good")
    for end in ("and everybody knows it.", "so stop it now!")
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]  # ids 0-3


def make_tiny_tokenizer(*, pad: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 480 tokens: bos 1, eos 2, pad 3 (or none), ChatML template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>" if pad else None,
        additional_special_tokens=["<|endoftext|>"],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return str(tokenizer.to_str())


def make_tiny_config(kind: Kind, **config: Any) -> PreTrainedConfig:
    """The config of a tiny model; `config` overrides any field. Mistral has a sliding window of 16."""
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None if kind == "gpt2-no-pad" else 3}
    common = {"vocab_size": len(make_tiny_tokenizer()), "initializer_range": 0.5, **ends}
    if kind.startswith("gpt2"):
        return GPT2Config(**{**common, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, **config})
    rope = {
        **common,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    if kind == "llama":
        return LlamaConfig(**{**rope, **config})
    return MistralConfig(**{**rope, "sliding_window": 16, **config})


def make_tiny_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A float32 CPU model with seeded random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def make_tiny_backbone(kind: Kind, seed: int = 0, **config: Any) -> Backbone:
    """A `Backbone` of the kind, float32 on the CPU. "gpt2-no-pad": its tokenizer has no pad token."""
    model = make_tiny_model(make_tiny_config(kind, **config), seed)
    return from_model(model, make_tiny_tokenizer(pad=kind != "gpt2-no-pad"), id=f"tiny-{kind}-{seed}")
