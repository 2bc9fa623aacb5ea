"""A program that tries a GGUF with llama.cpp and prints what it is, as one JSON line. Run as a file, in a process of
its own: a damaged file may bring llama.cpp down, and then it brings down nobody else.

Knows llama.cpp's C interface; imports nothing of this package.
"""

from __future__ import annotations

import ctypes
import json
import logging
import math
import sys
from typing import Any

_FEW = 32
"""Slots that the trial needs."""
_MROPE = 8
"""The bit of a rope type whose positions have several parts."""


class _NotServed(Exception):
    """Why a file cannot be served."""


def main(path: str) -> dict[str, Any]:
    """All that is known of a file, or `{"error": …}`."""
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # what it says besides is no error
    lib: Any = llama_cpp
    lib.llama_backend_init()
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    params.use_extra_bufts = False
    model = lib.llama_model_load_from_file(path.encode(), params)
    if not model:
        return {"error": "llama.cpp cannot load it"}
    try:
        facts = _facts(lib, model)
        scales = _scales(facts)
        facts["embedding_factor"] = _tried(lib, model, facts, path, scales)
    except _NotServed as error:
        return {"error": str(error), "served": False}
    return facts


def _facts(lib: Any, model: Any) -> dict[str, Any]:
    buffer = ctypes.create_string_buffer(1 << 14)

    def text(call: Any, *args: Any) -> str:
        call(model, *args, buffer, len(buffer))
        return buffer.value.decode(errors="replace")

    meta = {
        text(lib.llama_model_meta_key_by_index, index): text(lib.llama_model_meta_val_str_by_index, index)
        for index in range(lib.llama_model_meta_count(model))
    }
    meta = {key: value for key, value in meta.items() if not key.startswith("tokenizer.")}
    architecture = meta.get("general.architecture", "")
    for kind, words in (
        ("is_recurrent", "it keeps a recurrent state, which cannot be rewound"),
        ("is_hybrid", "some of its layers keep a recurrent state, which cannot be rewound"),
        ("is_diffusion", "it is a diffusion model"),
        ("has_encoder", "it is an encoder or an encoder-decoder"),
    ):
        if getattr(lib, f"llama_model_{kind}")(model):
            raise _NotServed(words)
    vocab = lib.llama_model_get_vocab(model)
    size = lib.llama_vocab_n_tokens(vocab)
    return {
        "architecture": architecture,
        "description": text(lib.llama_model_desc),
        "meta": meta,
        "vocab_size": size,
        "hidden_size": lib.llama_model_n_embd_inp(model),
        "num_layers": lib.llama_model_n_layer(model),
        "context": lib.llama_model_n_ctx_train(model),
        "window": lib.llama_model_n_swa(model) or None,
        "several_positions": bool(lib.llama_model_rope_type(model) & _MROPE),
        "learned_positions": lib.llama_model_rope_type(model) == -1,
        "parameters": lib.llama_model_n_params(model),
        "end_ids": [token for token in range(size) if lib.llama_vocab_is_eog(vocab, token)],
    }


def _scales(facts: dict[str, Any]) -> tuple[float, bool] | None:
    """What this family multiplies an embedding by before its first layer; and whether transformers does so after
    `inputs_embeds`, so that a soft prompt was trained before it. None: not known."""
    architecture, width = facts["architecture"], facts["hidden_size"]
    stated = facts["meta"].get(f"{architecture}.embedding_scale")
    if architecture.startswith("gemma"):
        return math.sqrt(width), False
    if stated is None and architecture not in ("minicpm", "grok"):
        return 1.0, False
    return (float(stated), True) if stated is not None and architecture.startswith("granite") else None


def _tried(lib: Any, model: Any, facts: dict[str, Any], path: str, scales: tuple[float, bool] | None) -> float | None:
    """Decode a few tokens. The factor that a virtual token is to be multiplied by; None: virtual tokens cannot be
    served."""
    import numpy as np

    params = lib.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.n_batch, params.n_ubatch = _FEW, 1, _FEW, _FEW
    params.type_k = params.type_v = lib.GGML_TYPE_F32
    params.offload_kqv = False
    context = lib.llama_init_from_model(model, params)
    if not context:
        raise _NotServed("llama.cpp makes no context for it")
    memory, vocab = lib.llama_get_memory(context), facts["vocab_size"]
    first, second = 5 % vocab, 7 % vocab

    def read(value: Any, position: int) -> Any:
        embedded = not isinstance(value, int)
        batch = lib.llama_batch_init(1, len(value) if embedded else 0, 1)
        batch.n_tokens, batch.pos[0], batch.n_seq_id[0], batch.seq_id[0][0], batch.logits[0] = 1, position, 1, 0, 1
        if embedded:
            ctypes.memmove(batch.embd, np.ascontiguousarray(value, np.float32).ctypes.data, 4 * len(value))
        else:
            batch.token[0] = value
        failed = lib.llama_decode(context, batch)
        lib.llama_batch_free(batch)
        if failed:
            raise _NotServed(f"llama.cpp cannot decode with it ({failed})")
        return np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), shape=(vocab,)).copy()

    read(first, 0)
    wanted = read(second, 1)
    if not np.isfinite(wanted).all():
        raise _NotServed("its logits are not finite: the weights are damaged")
    if not lib.llama_memory_seq_rm(memory, 0, 1, -1):
        raise _NotServed("its cache cannot be rewound")
    if not np.allclose(read(second, 1), wanted, rtol=1e-4, atol=1e-4):
        raise _NotServed("after a rewind it says something else")
    if scales is None or facts["several_positions"]:
        return None
    row = embeddings(path, second, second + 1)[0]
    if len(row) != facts["hidden_size"]:
        return None
    scale, before = scales
    for factor in {1.0, scale}:
        lib.llama_memory_seq_rm(memory, 0, 1, -1)
        found = read(row * factor, 1)
        if np.abs(found - wanted).max() <= 1e-3 * max(1.0, np.abs(wanted).max()):
            return factor if before else factor / scale
    return None


def embeddings(path: str, first: int, last: int) -> Any:
    """Rows of the embedding matrix, in float32: of the tokens from `first` to before `last`."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    for tensor in GGUFReader(path).tensors:
        if tensor.name == "token_embd.weight":
            return dequantize(tensor.data[first:last], tensor.tensor_type)
    raise _NotServed("it has no embeddings of its tokens")


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
