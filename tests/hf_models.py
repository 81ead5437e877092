"""Causal language models of transformers, built small from their own config class, whatever its fields are called.

Field names are matched, not models: every width becomes 32, every count of heads 4 over 2 key-value heads, every number
of layers as many as it takes to have one of each kind. `OVERRIDES` holds what some configs need besides, because their
fields must agree with each other.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

ROWS, LENGTH, VOCAB = 4, 8, 96

_SIZES: Mapping[int, tuple[str, ...]] = {
    VOCAB: ("vocab_size",),
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

OVERRIDES: Mapping[str, Mapping[str, Any]] = {}


class Unbuildable(Exception):
    """The config class does not give a small model; the message says why."""


def small_config(name: str) -> Any:
    """The config of model type `name`, small, without dropout."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = CONFIG_MAPPING[name]
    overrides = dict(OVERRIDES.get(name, {}))
    return _small(cls, overrides)


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
    kinds = fields.get("layer_types")
    if isinstance(kinds, list | tuple) and kinds:
        kept = list(dict.fromkeys(kinds))
        kept = (kept * 2)[: max(2, len(kept))]
        values["layer_types"] = kept
        values["num_hidden_layers"] = len(kept)
    for sub, sub_cls in getattr(cls, "sub_configs", {}).items():
        if isinstance(getattr(default, sub, None), sub_cls) and hasattr(sub_cls, "model_type"):
            values[sub] = _small(sub_cls, nested.get(sub, {}))
    return cls(**{**values, **fixed})


def build(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model and one batch; labels hold -100 unevenly over the rows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = small_config(name)
    torch.manual_seed(seed)
    cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    module = cls(config)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB - 1, (ROWS, LENGTH), generator=generator)
    ignored = torch.rand(ROWS, LENGTH, generator=generator) < torch.arange(ROWS)[:, None] / ROWS
    return module.train(), {"input_ids": ids, "labels": torch.where(ignored, -100, ids)}
