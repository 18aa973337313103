"""The numbers of a GGUF file's small tensors."""

from __future__ import annotations

import torch

from patcher.checkpoint.gguf.format import F32, GgufTensor
from patcher.errors import InputError


def read_floats(tensor: GgufTensor) -> torch.Tensor:
    """An F32 tensor's values, [shape reversed] as torch counts.

    Raises:
        InputError: it is not F32, or the file has become shorter.
    """
    if tensor.type != F32:
        raise InputError(
            "this tensor is not F32, and llama.cpp takes no other type for it",
            where=f"{tensor.file}: {tensor.name}",
            found=tensor.type_name,
            remedy="convert the model again with llama.cpp's own converter",
            code="gguf",
        )
    return read_bytes(tensor).view(torch.float32).reshape(tensor.shape[::-1])


def read_bytes(tensor: GgufTensor) -> torch.Tensor:
    """A tensor's data as it is stored: uint8 [bytes].

    Raises:
        InputError: the file has become shorter.
    """
    raw = bytearray(tensor.size)
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        done = file.readinto(raw)
    if done < tensor.size:
        where = f"{tensor.file}: {tensor.name}"
        raise InputError("the file is truncated", where=where, remedy="download or convert the file again", code="gguf")
    return torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
