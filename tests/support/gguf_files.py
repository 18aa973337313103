"""What the tests of patched GGUF files share."""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from support.gguf_models import HIDDEN

from patcher.checkpoint.gguf.file import read_floats, read_gguf
from patcher.checkpoint.gguf.format import SCALARS, GgufFile
from patcher.checkpoint.gguf.model import read_model
from patcher.gguf.edits import GgufEdit
from patcher.gguf.patch import GgufResult, write_patched

QUANTISATIONS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K_M", "Q6_K"]
LAYER = 1
BIAS = f"blk.{LAYER}.ffn_down.bias"


def vector(seed: int = 0) -> torch.Tensor:
    return torch.randn(HIDDEN, generator=torch.Generator().manual_seed(seed))


def patch(source: Path, output: Path, *edits: GgufEdit, **options: bool) -> GgufResult:
    chosen = {"add": False, "link": False, "force": False} | options
    return write_patched(read_model(source), list(edits) or [edit()], output, **chosen)


def edit(layer: int = LAYER, seed: int = 0, name: str = "love") -> GgufEdit:
    return GgufEdit(name, layer, vector(seed), 1.0)


def raw_tensors(path: Path) -> dict[str, bytes]:
    content = path.read_bytes()
    return {t.name: content[t.start : t.start + t.size] for t in read_gguf(path).tensors.values()}


def raw_entries(path: Path) -> dict[str, bytes]:
    content = path.read_bytes()
    return {key: content[e.start : e.end] for key, e in read_gguf(path).entries.items()}


def read_values(file: GgufFile, key: str) -> list[int] | list[float]:
    """A metadata entry of numbers: an array's elements, or the one number of a scalar."""
    entry = file.entries[key]
    code = SCALARS[entry.type]
    count = 1 if entry.count is None else entry.count
    content = file.path.read_bytes()[: entry.end]
    return list(struct.unpack(f"<{count}{code[1:]}", content[len(content) - count * struct.calcsize(code) :]))


def floats(path: Path, name: str) -> torch.Tensor:
    return read_floats(read_model(path).tensors[name])
