"""A Llama's weights as a GGUF file, as they are or rounded. Knows names and orders of tensors in both worlds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

__all__ = ["write_gguf"]

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    file: Path, model: Any, tokenizer: PreTrainedTokenizerBase, *, name: str, rounded: str | None = None
) -> None:
    """Write `model`, a `LlamaForCausalLM`, with a byte-level BPE tokenizer whose vocabulary is not larger than its.

    `rounded` is a name of `GGMLQuantizationType` for the matrices ("Q4_0"); else all numbers are F32.
    """
    c = model.config
    writer = GGUFWriter(file, "llama")
    writer.add_name(name)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_dimension_count(c.hidden_size // c.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(c.vocab_size)
    _add_tokenizer(writer, tokenizer, c.vocab_size)
    for path, weight in model.state_dict().items():
        if path == "lm_head.weight" and c.tie_word_embeddings:
            continue
        rows = weight.float().numpy()
        for kind, heads in (("q_proj", c.num_attention_heads), ("k_proj", c.num_key_value_heads)):
            if kind in path:  # llama.cpp turns pairs of neighbours, transformers the two halves
                rows = rows.reshape(heads, 2, len(rows) // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)
        if rounded is not None and rows.ndim == 2 and rows.shape[1] % 32 == 0:
            kind_of = GGMLQuantizationType[rounded]
            writer.add_tensor(_name(path), quantize(rows, kind_of), raw_dtype=kind_of)
        else:
            writer.add_tensor(_name(path), rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(path: str) -> str:
    if path.startswith("model.layers."):
        layer, _, rest = path.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{_LAYER[rest.removesuffix('.weight')]}.weight"
    return {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }[path]


def _add_tokenizer(writer: GGUFWriter, tokenizer: Any, size: int) -> None:
    told = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    known = {index: token for token, index in tokenizer.get_vocab().items()}
    special = set(tokenizer.all_special_ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([known.get(index, f"<|unused_{index}|>") for index in range(size)])
    writer.add_token_types(
        [
            TokenType.CONTROL if index in special else TokenType.NORMAL if index in known else TokenType.UNUSED
            for index in range(size)
        ]
    )
    writer.add_token_merges([" ".join(merge) if isinstance(merge, list) else merge for merge in told["merges"]])
    for kind in ("bos", "eos", "pad"):
        if (token := getattr(tokenizer, f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(token)
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
