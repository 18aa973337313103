"""The config that a model type has by default, made one of a causal LM: what the class leaves out is filled in.

It stands for the architecture where there is no checkpoint: ``patch-model inspect NAME`` and ``--all``.
"""

from __future__ import annotations

from typing import Any

from patcher.architectures.config_keys import stated
from patcher.architectures.model_class import quiet_transformers

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# Defaults that make no model, or not the one that is meant.
NEEDED: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {**_ROPE, "mrope_section": [24, 20, 20]}}},
    "dbrx": {"attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500000.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hyperclovax": {"use_post_norm": False},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 128, "indexer_budget": 2048,
        "indexer_compress_ratio": 64, "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.25},
    },
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"num_mem_blocks": 2},
}  # fmt: skip


def default_config(model_type: str) -> Any:
    """The default config of a model type; an encoder's class is told to be a decoder."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with quiet_transformers():
        config = CONFIG_MAPPING[model_type](**NEEDED.get(model_type, {}))
    if stated(config, "is_decoder") is False:
        config.is_decoder = True
    return config
