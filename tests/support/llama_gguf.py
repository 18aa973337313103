"""A tiny Llama as GGUF, written tensor by tensor: no converter is needed to try a control vector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def write_llama(model: Any, path: Path) -> None:
    """Write a LlamaForCausalLM with plain rotary embeddings, fp32, and a vocabulary of placeholders."""
    import gguf

    config = model.config
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{number}>".encode() for number in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([1] * config.vocab_size)

    def halves(weight: torch.Tensor, count: int) -> torch.Tensor:
        # llama.cpp rotates neighbours, transformers halves.
        return weight.reshape(count, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)

    stored = model.state_dict()
    tensors = {
        "token_embd": stored["model.embed_tokens.weight"],
        "output_norm": stored["model.norm.weight"],
        "output": stored["lm_head.weight"],
    }
    for block in range(config.num_hidden_layers):
        own = {key.removeprefix(f"model.layers.{block}."): value for key, value in stored.items()}
        tensors |= {
            f"blk.{block}.attn_norm": own["input_layernorm.weight"],
            f"blk.{block}.attn_q": halves(own["self_attn.q_proj.weight"], heads),
            f"blk.{block}.attn_k": halves(own["self_attn.k_proj.weight"], groups),
            f"blk.{block}.attn_v": own["self_attn.v_proj.weight"],
            f"blk.{block}.attn_output": own["self_attn.o_proj.weight"],
            f"blk.{block}.ffn_norm": own["post_attention_layernorm.weight"],
            f"blk.{block}.ffn_gate": own["mlp.gate_proj.weight"],
            f"blk.{block}.ffn_up": own["mlp.up_proj.weight"],
            f"blk.{block}.ffn_down": own["mlp.down_proj.weight"],
        }
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
