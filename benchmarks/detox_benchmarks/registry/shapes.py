"""Tiny random models of transformers' types. Knows config fields by their names; knows no engine.

A type's default config is shrunk field by field, so that a new type mostly needs no line here. What must fit together
in a way of its own stands in `SPECIAL`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["default_config", "tiny_config", "tiny_model", "tiny_tokenizer"]

_VALUES: dict[int, str] = {
    480: "vocab_size vocab_size_per_layer_input unpadded_vocab_size",
    32: "hidden_size n_embd d_model emb_dim embedding_size embedding_dim input_embedding_size output_embedding_size "
    "word_embed_proj_dim lru_width attention_hidden_size pronunciation_vocab_size shape_vocab_size",
    48: "intermediate_size ffn_dim dff ffn_hidden_size dim_ff d_inner feed_forward_size decoder_ffn_dim "
    "encoder_ffn_dim intermediate_size_mlp mlp_hidden_size",
    24: "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
    "shared_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size",
    # heads and layers
    4: "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
    "swa_num_attention_heads num_hidden_layers n_layer n_layers num_layers decoder_layers num_blocks rotary_dim "
    "num_experts num_local_experts n_routed_experts moe_num_experts qk_rope_head_dim mamba_chunk_size chunk_size "
    "mamba_dt_rank time_step_rank adapter_rank laurel_rank gated_norm_rank linear_num_value_heads linear_num_heads "
    "d_rel prompt_length block_size local_attn_chunk_length lsh_attn_chunk_length",
    2: "num_key_value_heads swa_num_key_value_heads num_kv_heads num_experts_per_tok moe_topk moe_k "
    "num_experts_per_token zero_expert_num linear_num_key_heads o_groups hc_mult hc_count num_layers_per_stack "
    "n_layers_per_attn_res_block num_kv_shared_layers altup_num_inputs heads_per_ngram split_ngram_parts "
    "attn_layer_period expert_layer_period layer_group_size sliding_window_pattern global_attn_every_n_layers "
    "max_window_layers num_decoder_layers",
    1: "n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts encoder_layers "
    "mamba_n_groups mamba_ngroups n_groups num_mem_blocks first_k_dense_replace num_dense_layers attn_layer_offset "
    "expert_layer_offset moe_layer_start_index make_ngram_vocab_size_divisible_by num_encoder_layers",
    8: "head_dim swa_head_dim attention_head_dim kv_channels dim_head d_head attention_head_size v_head_dim "
    "swa_v_head_dim sliding_window window_size sliding_window_size attention_window_size attention_chunk_size "
    "floor_scale o_lora_rank qk_nope_head_dim index_head_dim mamba_d_state mamba_n_heads mamba_d_head mamba_headdim "
    "mamba_num_heads mamba_head_dim ssm_state_size n_mamba_heads state_size linear_key_head_dim linear_value_head_dim "
    "linear_head_dim hidden_size_per_layer_input query_pre_attn_scalar rel_extent router_hidden_size "
    "pronunciation_embed_dim shape_embed_dim hc_lowrank keep_window_size block_multiple_of log_scaling_n_floor",
    16: "kv_lora_rank q_lora_rank index_n_heads ple_embed_dim",
    64: "mamba_d_ssm encoder_hash_byte_group_vocab",
    256: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions",
    6: "index_topk",
    3: "conv_L_cache moe_layer_end_index",
    12: "qk_head_dim",
    0: "num_nextn_predict_layers",
    997: "ngram_vocab_size_base",
}  # fmt: skip
_SMALL = {name: value for value, names in _VALUES.items() for name in names.split()}
"""Windows and chunks of 8 tokens, so that a few dozen lie far past them."""
_SMALL_PARTS = {
    "image_size": 16, "patch_size": 8, "depth": 1, "out_hidden_size": 32, "embed_dim": 32, "codebook_size": 16,
    "num_embeddings": 16, "base_channels": 32, "latent_channels": 4, "channel_multiplier": [1], "num_res_blocks": 1,
    "mlp_dim": 48, "projection_dim": 32, "output_dim": 32, "vision_output_dim": 32, "mm_embed_dim": 32,
    "adapter_out_dim": 32, "video_temporal_patch_size": 2, "text_hidden_size": 32,
    "adapter_input_size": 32, "adapter_in_dim": 32, "hidden_size_global": 32,
}  # fmt: skip
"""Of what a wrapper holds besides its text model; it is built and never run."""
_PATTERNS = (
    "layer_types", "mlp_layer_types", "indexer_types", "layers_block_type", "layer_rope_theta", "no_rope_layers",
    "activation_sparsity_pattern", "intermediate_size", "num_attention_heads_per_layer",
)  # fmt: skip
"""Lists of one entry a layer: all kinds that the default has, by turns."""
_ROPES = {kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in ("full_attention", "sliding_attention")}

_MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
_MROPES = (
    "qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text", "glm46v_text", "glm_ocr_text",
    "paddleocr_vl_text", "qwen2_5_omni_text", "cosmos3_edge_text",
)  # fmt: skip
_ALTERNATING = ["full_attention", "sliding_attention"] * 2
_HYBRID = ["linear_attention", "full_attention"] * 2
_BERTS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    **{kind: {"is_decoder": True} for kind in _BERTS},
    **{kind: {"sliding_window": 8} for kind in ("mistral", "ministral3", "starcoder2", "mixtral", "phi3", "phimoe")},
    **{
        kind: {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2, "layer_types": _ALTERNATING}
        for kind in ("qwen2", "qwen2_moe", "qwen3")
    },
    "qwen3_moe": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0},
    **{kind: {"head_dim": 8} for kind in ("ministral", "hunyuan_v1_dense", "hunyuan_v1_moe")},
    **{kind: {"layer_types": ["conv", "full_attention"] * 2} for kind in ("lfm2", "lfm2_moe")},
    **{kind: {"logit_scale": 1.0} for kind in ("cohere", "cohere2", "cohere2_moe")},
    **{kind: {"rope_parameters": _MROPE} for kind in _MROPES},
    "chameleon": {"vocabulary_map": {"<image>": 4, "IMGIMGA": 5}},
    "glm4v_moe_text": {"head_dim": 8, "rope_parameters": _MROPE | {"mrope_section": [1, 1, 0]}},
    "glm5_next_text": {"index_topk": 6, "index_kpool": 2, "qk_rope_head_dim": 0},
    "granite4_vision": {"deepstack_layer_map": [[1, 0]]},
    "hunyuan_vl_text": {"head_dim": 8, "rope_parameters": _MROPE},
    "molmo2_adapter": {"vision_feature_layer": [3, 1]},
    "step3p5": {"sliding_window": 8},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"layer_types": _ALTERNATING, "rope_parameters": _ROPES, "logit_scale": 1.0},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": _HYBRID},
    "hrm_text": {"num_hidden_layers": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    # Its full pass holds time steps above this floor, its single steps do not: a difference within transformers.
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "time_step_min": 1e-9},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "rope_parameters": _ROPES["full_attention"] | {"partial_rotary_factor": 0.5},
    },
    "reformer": {
        "is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [8, 24], "attn_layers": ["local"] * 2,
        "num_attention_heads": 4,
    },
    "xlm": {"causal": True},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "time_step_min": 1e-9},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
_DEFAULTS = {
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    }
}
"""Where transformers refuses its own defaults."""
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}


def default_config(kind: str) -> PreTrainedConfig:
    """The config of a type as transformers has it."""
    from transformers import CONFIG_MAPPING

    config: PreTrainedConfig = CONFIG_MAPPING[kind](**_DEFAULTS.get(kind, {}))
    return config


def tiny_config(kind: str, **fields: Any) -> PreTrainedConfig:
    """The shrunk config of a type, its parts shrunk too; `fields` override any field."""
    default = default_config(kind)
    config_class: Any = type(default)
    parts: dict[str, Any] = {}
    for name in default.sub_configs:
        part = getattr(default, name, None)
        if part is not None:
            is_text = part is default.get_text_config(decoder=True)
            small = _shrunk(part) | (_ENDS if is_text else {}) | SPECIAL.get(part.model_type, {})
            if not is_text:
                known = part.to_dict()
                small |= {
                    key: [value] * len(known[key]) if isinstance(known[key], list) and isinstance(value, int) else value
                    for key, value in _SMALL_PARTS.items()
                    if known.get(key) is not None
                }
            parts[name] = {"model_type": part.model_type, **small}
    config: PreTrainedConfig = config_class(**{**_shrunk(default), **parts, **_ENDS, **SPECIAL.get(kind, {}), **fields})
    return config


def _shrunk(default: PreTrainedConfig) -> dict[str, Any]:
    known = default.to_dict()
    plain = {key for key, value in known.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    small: dict[str, Any] = {name: value for name, value in _SMALL.items() if name in plain}
    small |= {name: _SMALL[name[4:]] for name in plain if name.startswith("swa_") and name[4:] in _SMALL}
    # The ids that stand for images lie past the small vocabulary; nothing here draws 0.
    small |= {key: 0 for key in plain if key.endswith(("_token_id", "_token_index")) and known[key] >= 480}
    layers = small.get("num_hidden_layers", 4)
    for key in _PATTERNS:
        value = known.get(key)
        if isinstance(value, list) and len(value) > 2:
            kinds = list(dict.fromkeys(value)) if key not in _SMALL else [_SMALL[key]]
            kinds = [4] if key == "num_attention_heads_per_layer" else kinds
            small[key] = [kinds[i % len(kinds)] for i in range(layers)]
    if known.get("num_kv_shared_layers") == 0:
        small["num_kv_shared_layers"] = 0
    if "kv_lora_rank" in known:  # latent attention: as many key/value heads as heads, and a head's size by its parts
        small["num_key_value_heads"] = 4
        if "head_dim" in small:
            small["head_dim"] = 4 if known["head_dim"] == known.get("qk_rope_head_dim") else 8
    return small


def tiny_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A float32 CPU model with seeded random weights, large enough that its distributions are peaked."""
    from detox_guard.models.checks import auto_class

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: PreTrainedModel = auto_class(config).from_config(config, dtype=torch.float32)
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and weight.is_floating_point():
                size = 0.3 if "embed" in name or "wte" in name else 1.5 / weight.shape[-1] ** 0.5
                weight.copy_(torch.randn(weight.shape) * size)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """One that knows its special tokens; nothing here reads text."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"a": 0, "<s>": 1, "</s>": 2, "<pad>": 3}
    core = Tokenizer(models.WordLevel(words, unk_token="a"))
    made: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
    return made
