"""Write safetensors files tensor by tensor, so that memory holds one tensor and not a file of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from patcher.checkpoint.safetensors_file import DTYPES, tensor_bytes

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is written.

    Attributes:
        dtype: its torch dtype.
        shape: its shape.
        make: gives it; called once a write.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


AnyTensor = torch.Tensor | LazyTensor


def write_tensors(path: Path, tensors: Mapping[str, AnyTensor], metadata: Mapping[str, str] | None = None) -> int:
    """Write one safetensors file; the bytes written. Equal arguments give equal bytes.

    Args:
        path: does not exist.
        tensors: by name.
        metadata: of the header, in this order; ``format: pt`` stands before it.

    Raises:
        ValueError: a lazy tensor turned out to have another dtype or shape than it said.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    place = 0
    for name, tensor in _ordered(tensors):
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.nbytes],
        }
        place += tensor.nbytes
    raw = packed_header(header)
    with path.open("xb") as file:
        file.write(raw)
        for name, tensor in _ordered(tensors):
            content = tensor.make() if isinstance(tensor, LazyTensor) else tensor
            if content.dtype != tensor.dtype or tuple(content.shape) != tuple(tensor.shape):
                raise ValueError(
                    f"{name}: {content.dtype} {tuple(content.shape)} instead of {tensor.dtype} {tensor.shape}"
                )
            file.write(tensor_bytes(content))
    path.chmod(0o644)
    return len(raw) + place


def _ordered(tensors: Mapping[str, AnyTensor]) -> list[tuple[str, AnyTensor]]:
    # Wide dtypes first keeps every tensor aligned, as the stock writer does.
    return sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))


def split_into_shards(tensors: Mapping[str, AnyTensor], limit: int) -> list[dict[str, AnyTensor]]:
    """The tensors in files of at most ``limit`` bytes (or of one tensor that is larger)."""
    shards: list[dict[str, AnyTensor]] = []
    size = 0
    for name, tensor in tensors.items():
        if not shards or size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def packed_header(header: Mapping[str, Any]) -> bytes:
    """The length prefix and the JSON header, padded as the stock writer pads it."""
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % _ALIGNMENT)
    return len(raw).to_bytes(8, "little") + raw
