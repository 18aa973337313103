"""The numbers of a GGUF file: of its metadata, and of its small tensors."""

from __future__ import annotations

import struct

import torch

from patcher.checkpoint.gguf.format import F32, SCALARS, GgufFile, GgufTensor
from patcher.errors import InputError


def read_values(file: GgufFile, key: str) -> list[int] | list[float]:
    """A metadata entry of numbers: an array's elements, or the one number of a scalar.

    Raises:
        InputError: it is not there, or holds texts.
    """
    entry = file.entries.get(key)
    where = f"{file.path}: {key}"
    if entry is None:
        raise InputError("a metadata entry is missing", where=where, remedy="convert the model again", code="gguf")
    if entry.type not in SCALARS or isinstance(entry.scalar, str):
        raise InputError("a metadata entry does not hold numbers", where=where, code="gguf")
    code = SCALARS[entry.type]
    count = 1 if entry.count is None else entry.count
    size = count * struct.calcsize(code)
    with file.path.open("rb") as opened:
        opened.seek(entry.end - size)
        raw = opened.read(size)
    if len(raw) < size:
        raise _truncated(where)
    return list(struct.unpack(f"<{count}{code[1:]}", raw))


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
        raise _truncated(f"{tensor.file}: {tensor.name}")
    return torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)


def _truncated(where: str) -> InputError:
    return InputError("the file is truncated", where=where, remedy="download or convert the file again", code="gguf")
