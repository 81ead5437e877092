"""Causal language models of transformers, built small from their own config class, whatever its fields are called.

Field names are matched, not models: every width becomes 32, every count of heads 4 over 2 key-value heads, every number
of layers as many as it takes to have one of each kind. `OVERRIDES` holds what some configs need besides, because their
fields must agree with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

ROWS, LENGTH, VOCAB = 4, 8, 96

_SIZES: Mapping[int, tuple[str, ...]] = {
    VOCAB: ("vocab_size", "vocab_size_per_layer_input"),
    32: ("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "embedding_size", "input_embedding_size"),
    64: (
        "intermediate_size",
        "ffn_dim",
        "n_inner",
        "decoder_ffn_dim",
        "encoder_ffn_dim",
        "ffn_hidden_size",
        "dim_ff",
        "dff",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "shared_intermediate_size",
        "dense_intermediate_size",
        "expert_ffn_hidden_size",
        "intermediate_size_mlp",
        "max_position_embeddings",
        "n_positions",
        "max_seq_len",
        "n_ctx",
        "model_max_length",
        "max_target_positions",
    ),
    4: (
        "num_attention_heads",
        "n_head",
        "n_heads",
        "num_heads",
        "decoder_attention_heads",
        "encoder_attention_heads",
        "num_decoder_attention_heads",
        "num_encoder_attention_heads",
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "moe_num_experts",
        "conv_kernel",
        "mamba_d_conv",
        "swa_num_attention_heads",
        "linear_num_value_heads",
        "linear_num_heads",
        "index_n_heads",
        "index_topk",
    ),
    2: (
        "num_hidden_layers",
        "n_layer",
        "n_layers",
        "num_layers",
        "decoder_layers",
        "encoder_layers",
        "num_decoder_layers",
        "num_encoder_layers",
        "num_key_value_heads",
        "num_kv_heads",
        "num_query_groups",
        "swa_num_key_value_heads",
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_topk",
        "moe_k",
        "linear_num_key_heads",
        "n_group",
        "topk_group",
        "type_vocab_size",
    ),
    8: (
        "head_dim",
        "hidden_size_per_layer_input",
        "laurel_rank",
        "index_head_dim",
        "attention_head_size",
        "attention_head_dim",
        "v_head_dim",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "q_lora_rank",
        "kv_lora_rank",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_head_dim",
        "swa_head_dim",
        "kv_channels",
        "state_size",
        "mamba_d_state",
        "ssm_state_size",
        "time_step_rank",
        "mamba_dt_rank",
    ),
}
_WANTED = {name: size for size, names in _SIZES.items() for name in names}

_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_chunk_size": 4}

_QWEN4 = {
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "indexer_head_dim": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "hc_lowrank": 8,
}
_DOTS3 = {"per_layer_config": {}, "shared_experts_intermediate_size": 64, "head_dim": 16}
_SLIDING = ["sliding_attention", "full_attention"]

OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "blt": {
        "use_cache": False,
        "patch_in_forward": False,
        "encoder_hash_byte_group_vocab": 64,
        "patcher_config": {"vocab_size": 260},
        "encoder_config": {"vocab_size": 260, "hidden_size_global": 32},
        "decoder_config": {"vocab_size": 260, "hidden_size_global": 32},
        "vocab_size": 260,
    },
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note": {"text_config": _DOTS3},
    "dots3_note_text": _DOTS3,
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "num_hidden_layers": 4,
        "layer_types": _SLIDING * 2,
        "intermediate_size": 64,
    },
    "git": {"vision_config": {"image_size": 8, "patch_size": 4}},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**_MAMBA2, "layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"num_expert_group": 1, "topk_group": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
    "ministral": {"head_dim": 8},
    "musicgen": {"decoder": {"num_codebooks": 1, "pad_token_id": 95, "bos_token_id": 95}},
    "musicgen_melody": {"decoder": {"num_codebooks": 1, "pad_token_id": 95, "bos_token_id": 95}},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"lru_width": 32, "num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "local"],
        "axial_pos_shape": [2, 4],
        "axial_pos_embds_dim": [8, 24],
        "local_attn_chunk_length": 4,
        "max_position_embeddings": 8,
    },
    "xlstm": {"mode": "train", "chunk_size": 4, "use_cache": False, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
        "num_hidden_layers": 3,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "chunk_size": 4,
        "adapter_rank": 8,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


EXTRA_INPUTS: Mapping[str, Mapping[str, Callable[[Tensor], Any]]] = {
    # Its experts loop over values, in attention too, which is kept whole and cannot take a cache then.
    "jetmoe": {
        "use_cache": lambda ids: False,
        "position_ids": lambda ids: torch.arange(ids.shape[1]).expand_as(ids).contiguous(),
    },
    "git": {"pixel_values": lambda ids: torch.linspace(-1, 1, len(ids) * 192).view(len(ids), 3, 8, 8)},
}
LABELS_BY_CODEBOOK = ("musicgen", "musicgen_melody")


def small_config(name: str) -> tuple[type[nn.Module], Any]:
    """The model class that belongs to model type `name`, and its config: small, without dropout."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    whole, overrides = CONFIG_MAPPING[name], OVERRIDES.get(name, {})
    cls = MODEL_FOR_CAUSAL_LM_MAPPING[whole]
    # The language model of a model of several parts takes the config of its own part.
    part = next((key for key, sub in whole.sub_configs.items() if sub is cls.config_class), None)
    if part is None or issubclass(whole, cls.config_class):
        return cls, _small(whole, overrides)
    return cls, _small(cls.config_class, overrides.get(part, {}))


def _small(cls: type, overrides: Mapping[str, Any]) -> Any:
    nested = {k: v for k, v in overrides.items() if isinstance(v, Mapping) and k in getattr(cls, "sub_configs", {})}
    fixed = {k: v for k, v in overrides.items() if k not in nested}
    try:
        default = cls()
    except Exception:
        default = cls(**fixed)
    values: dict[str, Any] = {}
    names = getattr(cls, "attribute_map", {})
    fields = {names.get(k, k): v for k, v in default.to_dict().items()}
    for field, value in fields.items():
        if isinstance(value, bool):
            continue
        if field in _WANTED and (isinstance(value, int) or field in ("num_key_value_heads", "n_inner", "num_kv_heads")):
            values[field] = _WANTED[field] if value is not None or field != "n_inner" else None
        elif isinstance(value, float) and ("drop" in field or "jitter" in field):
            values[field] = 0.0
        elif isinstance(value, int) and field.endswith(("token_id", "token_index")) and value >= VOCAB:
            values[field] = VOCAB - 1
    heads, groups = (fields.get(names.get(k, k)) for k in ("num_attention_heads", "num_key_value_heads"))
    if heads is not None and heads == groups:
        values["num_key_value_heads"] = 4  # as many as query heads, as latent attention needs it
    kinds = fields.get("layer_types")
    if isinstance(kinds, list | tuple) and kinds:
        kept = list(dict.fromkeys(kinds))
        kept = (kept * 2)[: max(2, len(kept))]
        values["layer_types"] = kept
        values["num_hidden_layers"] = len(kept)
    for sub in getattr(cls, "sub_configs", {}):
        if getattr(default, sub, None) is not None:
            values[sub] = _small(type(getattr(default, sub)), nested.get(sub, {}))
    return cls(**{**values, **fixed})


def build(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model and one batch; labels hold -100 unevenly over the rows."""
    cls, config = small_config(name)
    torch.manual_seed(seed)
    module = cls(config)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB - 1, (ROWS, LENGTH), generator=generator)
    ignored = torch.rand(ROWS, LENGTH, generator=generator) < torch.arange(ROWS)[:, None] / ROWS
    example = {"input_ids": ids, "labels": torch.where(ignored, -100, ids)}
    example |= {key: make(ids) for key, make in EXTRA_INPUTS.get(name, {}).items()}
    if name in LABELS_BY_CODEBOOK:
        example["labels"] = example["labels"].unsqueeze(-1)
    return module.train(), example
