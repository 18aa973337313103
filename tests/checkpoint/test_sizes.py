"""What a checkpoint becomes in memory, by its headers: quantised ones as what they are undone to."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.quantised_models import METHODS, quantise
from support.tiny_models import tiny_checkpoint

from patcher.architectures.quantised import FORMATS
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.safetensors_file import FLOATS
from patcher.checkpoint.sizes import file_bytes, fp32_bytes, largest_part, mapped_bytes

LLAMA, GPT_OSS = "meta-llama--Llama-3.2-1B", "openai--gpt-oss-20b"


def elements(checkpoint: CheckpointFolder) -> int:
    return sum(math.prod(info.shape) for info in checkpoint.tensors.values())


@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_checkpoint_counts_as_what_is_computed_with(tmp_path: Path, method: str) -> None:
    name, changes = (GPT_OSS, {"quantization_config": None}) if method == "mxfp4" else (LLAMA, {})
    tiny_checkpoint(tmp_path / "base", name, dtype=torch.bfloat16, tokenizer=False, **changes)
    dense = fp32_bytes(CheckpointFolder(tmp_path / "base"))
    assert dense == 4 * elements(CheckpointFolder(tmp_path / "base"))
    quantise(tmp_path / "base", method)
    checkpoint = CheckpointFolder(tmp_path / "base")
    if FORMATS[method.split()[0]].dequantise is None:
        stored = checkpoint.tensors.values()
        floats = sum(4 * math.prod(info.shape) for info in stored if info.dtype in FLOATS)
        packed = sum(info.end - info.start for info in stored if info.dtype not in FLOATS)
        assert fp32_bytes(checkpoint) == floats + packed < dense
    else:
        assert dense <= fp32_bytes(checkpoint) < 1.1 * dense
    if "packed" in method or method == "mxfp4":
        assert 4 * elements(checkpoint) < 0.8 * dense


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_four_bit_weights_in_storage_of_any_dtype(tmp_path: Path, storage: torch.dtype) -> None:
    packed = torch.zeros(64 * 32 // 2, dtype=torch.uint8).view(storage)[:, None]
    tensors = {"a.weight": packed, "a.weight.absmax": torch.zeros(32), "b.weight": torch.zeros(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    config: dict[str, Any] = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert fp32_bytes(CheckpointFolder(tmp_path)) == 4 * (64 * 32 + 32 + 8)


@pytest.mark.parametrize("groups", [None, {}, [], {"g": None}, {"g": {"weights": {"num_bits": "4"}}}])
def test_a_config_that_does_not_say_its_bits(tmp_path: Path, groups: Any) -> None:
    save_file({"a.weight": torch.zeros(8, 8, dtype=torch.int8)}, tmp_path / "model.safetensors")
    stated = {"quant_method": "compressed-tensors", "config_groups": groups}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": stated}))
    assert fp32_bytes(CheckpointFolder(tmp_path)) == 4 * 64


def test_files_and_the_largest_part(tmp_path: Path) -> None:
    tensors = {"wte.weight": 100, "h.0.mlp.experts.0.w": 30, "h.0.mlp.experts.1.w": 40, "h.1.mlp.w": 60}
    shards = {"model-00001-of-00002.safetensors": list(tensors)[:1], "model-00002-of-00002.safetensors": []}
    shards["model-00002-of-00002.safetensors"] = list(tensors)[1:]
    for file, names in shards.items():
        save_file({name: torch.zeros(tensors[name], dtype=torch.float16) for name in names}, tmp_path / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text("{}")
    checkpoint = CheckpointFolder(tmp_path)
    assert largest_part(checkpoint) == 400
    sizes = [(tmp_path / file).stat().st_size for file in shards]
    assert file_bytes(checkpoint) == sum(sizes) and mapped_bytes(checkpoint) == sum(sizes) + max(sizes)
