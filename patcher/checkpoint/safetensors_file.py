"""The tensors of one safetensors file, each read from its byte range alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from patcher.checkpoint.copying import read_range
from patcher.checkpoint.safetensors_header import (
    FLOATS,
    MAX_HEADER,
    METADATA,
    PREFIX,
    TensorInfo,
    broken_file,
    in_file_order,
    metadata_of,
    raw_header,
    read_header,
)
from patcher.errors import InputError

__all__ = [
    "DTYPES",
    "FLOATS",
    "MAX_HEADER",
    "METADATA",
    "PREFIX",
    "TensorInfo",
    "in_file_order",
    "metadata_of",
    "raw_header",
    "read_header",
    "read_tensor",
    "tensor_bytes",
]

_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
DTYPES: Mapping[str, torch.dtype] = {
    # Older releases of torch lack the newest ones.
    name: getattr(torch, torch_name)
    for name, torch_name in _TORCH_NAMES.items()
    if hasattr(torch, torch_name)
}


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """One tensor, in its stored dtype, read from its byte range alone.

    Raises:
        InputError: torch has no such dtype, or the file has become shorter.
    """
    if info.dtype not in DTYPES:
        raise InputError(
            f"the tensor {info.name!r} has a dtype that cannot be read", where=str(info.file), found=info.dtype
        )
    raw = read_range(info.file, info.start, info.size)
    if len(raw) < info.size:
        raise broken_file(info.file, "the file is truncated, or is not a safetensors file")
    if not raw:
        return torch.empty(info.shape, dtype=DTYPES[info.dtype])
    return torch.frombuffer(raw, dtype=DTYPES[info.dtype]).reshape(info.shape)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The little-endian bytes of a tensor, as safetensors stores them; a view where the tensor lies in one piece."""
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    view: memoryview = flat.view(torch.uint8).numpy().data
    return view
