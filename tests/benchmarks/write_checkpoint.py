"""Llama-shaped checkpoints of a given size, and the plan of an edit to them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHARDS = 4
LAYER = 3
GIB, MIB = 1 << 30, 1 << 20
WIDTHS = ((10**9, (2048, 5632, 32000)), (3 * 10**8, (1024, 2816, 32000)), (0, (512, 1408, 8000)))
"""From how many bytes on -> hidden size, MLP size, vocabulary."""


def shapes(config: dict[str, Any]) -> Iterator[tuple[str, list[int]]]:
    """Every tensor of an untied Llama without biases."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", [config["vocab_size"], hidden]
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        for name, rows in (("q", hidden), ("k", keys), ("v", keys), ("o", hidden)):
            yield f"{block}self_attn.{name}_proj.weight", [rows, hidden]
        yield f"{block}mlp.gate_proj.weight", [inner, hidden]
        yield f"{block}mlp.up_proj.weight", [inner, hidden]
        yield f"{block}mlp.down_proj.weight", [hidden, inner]
        yield f"{block}input_layernorm.weight", [hidden]
        yield f"{block}post_attention_layernorm.weight", [hidden]
    yield "model.norm.weight", [hidden]
    yield "lm_head.weight", [config["vocab_size"], hidden]


def make_checkpoint(folder: Path, size: int) -> Path:
    """A checkpoint of about ``size`` bytes, written piece by piece; the values are noise."""
    folder.mkdir(parents=True)
    hidden, inner, vocabulary = next(widths for least, widths in WIDTHS if size >= least)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": 4,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    a_layer = 2 * (hidden * (2 * hidden + 2 * (hidden // config["num_attention_heads"] * 4)) + 3 * hidden * inner)
    config["num_hidden_layers"] = max(LAYER + 1, (size - 4 * vocabulary * hidden) // a_layer)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = list(shapes(config))
    total = sum(2 * count(shape) for _, shape in tensors)
    noise = os.urandom(4 * MIB)
    weight_map: dict[str, str] = {}
    number, start = 0, 0
    while start < len(tensors):
        number += 1
        end, held = start, 0
        while end < len(tensors) and (held < total / SHARDS or number == SHARDS):
            held += 2 * count(tensors[end][1])
            end += 1
        name = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        write_shard(folder / name, tensors[start:end], noise)
        weight_map.update(dict.fromkeys((key for key, _ in tensors[start:end]), name))
        start = end
    assert number == SHARDS
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def count(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def write_shard(path: Path, tensors: list[tuple[str, list[int]]], noise: bytes) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, shape in tensors:
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, place + 2 * count(shape)]}
        place += 2 * count(shape)
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        while place:
            place -= file.write(noise[: min(place, len(noise))])


def flag_plan(config: dict[str, Any]) -> Any:
    """The route of Llama: a bias for every MLP, zero but for that of the edited block."""
    from patcher.routes.plan import Plan, TensorWrite

    writes = []
    for layer in range(config["num_hidden_layers"]):
        for part, size in (("gate", "intermediate_size"), ("up", "intermediate_size"), ("down", "hidden_size")):
            name = f"model.layers.{layer}.mlp.{part}_proj.bias"
            carried = layer if (layer, part) == (LAYER, "down") else None
            dtype = "F32" if carried is not None else "BF16"
            writes.append(TensorWrite(name, name, "created", carried, 1.0, (config[size],), dtype))
    changes = {"mlp_bias": True}
    return Plan("flag", "LlamaForCausalLM", "model.layers", {}, tuple(writes), {}, "benchmark", config_changes=changes)
