"""Checkpoints: safetensors, folders, pickled weights, configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from support.fuzz import seeds
from support.fuzz.registry import beside, each, reader
from support.fuzz.stock import same_as_safetensors, same_numbers
from support.fuzz.watch import Case
from support.tiny_models import CONFIGS

from patcher.checkpoint.bin_files import convert_bin, load_bin
from patcher.checkpoint.difference import compare
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.hashes import base_files
from patcher.checkpoint.prepare import read_config
from patcher.checkpoint.safetensors_file import DTYPES, TensorInfo, read_header, read_tensor
from patcher.checkpoint.sizes import fp32_bytes, largest_part
from patcher.checkpoint.writer import write_copy

RELEASED = ("meta-llama--Llama-3.2-1B", "openai-community--gpt2", "google--gemma-3-4b-it", "openai--gpt-oss-20b")


def _same_tensors(folder: Path, found: dict[str, TensorInfo]) -> None:
    same_as_safetensors(folder / "x.safetensors", found)


@reader("safetensors", each("x.safetensors", seeds.safetensors_file), _same_tensors)
def _safetensors(folder: Path, _out: Path) -> dict[str, TensorInfo]:
    found = read_header(folder / "x.safetensors")
    for info in found.values():
        if info.dtype in DTYPES:
            read_tensor(info)
    return found


def _same_checkpoint(folder: Path, found: CheckpointFolder) -> None:
    stated = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert same_numbers(found.config, stated)
    for name in found.weight_files:
        own = {key: info for key, info in found.tensors.items() if info.file.name == name}
        same_as_safetensors(folder / name, own)


@reader("checkpoint folder", seeds.checkpoints, _same_checkpoint)
def _checkpoint(folder: Path, out: Path) -> CheckpointFolder:
    found = CheckpointFolder(folder)
    assert found.tensors is not None
    base_files(found)
    fp32_bytes(found)
    largest_part(found)
    if all(info.dtype in DTYPES for info in found.tensors.values()):
        write_copy(found, out, created={"new.bias": torch.ones(2)}, replaced={}, config_changes={"a": 1})
        assert set(CheckpointFolder(out).tensors) == {*found.tensors, "new.bias"}
    return found


@reader("bin checkpoint", seeds.bin_checkpoints)
def _bin(folder: Path, out: Path) -> Any:
    found = CheckpointFolder(folder)
    for name in found.weight_files:
        load_bin(folder / name)
    return convert_bin(found, out / "converted").tensors


def _configs() -> list[Case]:
    return [{"config.json": (CONFIGS / f"{name}.json").read_bytes()} for name in RELEASED]


@reader("config.json", _configs, cost=10)
def _config(folder: Path, _out: Path) -> Any:
    return read_config(folder)


def _two() -> list[Case]:
    one, other = seeds.checkpoints()
    return [{**beside("b", one), **beside("a", other)}]


@reader("diff", _two)
def _diff(folder: Path, _out: Path) -> Any:
    renamed = {"model.norm.weight": "lm_head.weight"}
    found = compare(CheckpointFolder(folder / "a"), CheckpointFolder(folder / "b"), renamed)
    return json.dumps(found.as_json())
