"""Safetensors files, written without holding one in memory: tensor by tensor, or by the kernel, from other files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from patcher.checkpoint.copying import PAGE
from patcher.checkpoint.pieces import Appended, Bytes, Made, Range, Slices, append_pieces, joined
from patcher.checkpoint.safetensors_file import DTYPES, METADATA, PREFIX, TensorInfo, tensor_bytes

DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
_WORTH_SHARING = 1 << 20
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


@dataclass(frozen=True)
class NewTensor:
    """A tensor of a file that is to be written: its key, safetensors dtype and shape, and where its bytes come from."""

    name: str
    dtype: str
    shape: Sequence[int]
    content: Range | Slices | Made

    @classmethod
    def of(cls, info: TensorInfo, name: str) -> NewTensor:
        """A tensor of another file, under a name that may be new."""
        return cls(name, info.dtype, info.shape, Range(info.file, info.start, info.size))


def write_tensors(path: Path, tensors: Mapping[str, AnyTensor], metadata: Mapping[str, str] | None = None) -> int:
    """Write one safetensors file; the bytes written. Equal arguments give equal bytes. Memory: one tensor.

    Args:
        path: does not exist.
        tensors: by name.
        metadata: of the header, in this order; ``format: pt`` stands before it.

    Raises:
        ValueError: a lazy tensor turned out to have another dtype or shape than it said.
    """
    # Wide dtypes first keeps every tensor aligned, as the stock writer does.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    made = [
        NewTensor(name, DTYPE_NAMES[tensor.dtype], tensor.shape, Made(tensor.nbytes, partial(_content, name, tensor)))
        for name, tensor in ordered
    ]
    return assemble(path, {"format": "pt", **(metadata or {})}, made).size


def _content(name: str, tensor: AnyTensor) -> Iterator[memoryview]:
    content = tensor.make() if isinstance(tensor, LazyTensor) else tensor
    if content.dtype != tensor.dtype or tuple(content.shape) != tuple(tensor.shape):
        raise ValueError(f"{name}: {content.dtype} {tuple(content.shape)} instead of {tensor.dtype} {tensor.shape}")
    yield tensor_bytes(content)


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


def assemble(
    target: Path,
    metadata: Mapping[str, str] | None,
    tensors: Sequence[NewTensor],
    *,
    header: bytes | None = None,
    pad: bool = True,
) -> Appended:
    """Write the tensors, in this order, as one new safetensors file, mode 0644.

    Args:
        target: a file that does not exist.
        metadata: the header's; None leaves the key out.
        tensors: the file's.
        header: the whole header (length prefix included), instead of one that is made here.
        pad: a header that is made here may end in blanks, so that blocks can be shared.

    Raises:
        OutsideError: a file that is copied from became shorter.
    """
    if header is None:
        header = canonical_header(metadata, tensors)
        header = _padded(header, tensors) if pad else header
    with target.open("xb") as writer:
        done = append_pieces(writer, [Bytes(header), *(tensor.content for tensor in tensors)])
    target.chmod(0o644)
    return done


def canonical_header(metadata: Mapping[str, str] | None, tensors: Iterable[NewTensor]) -> bytes:
    """The header, length prefix included, as the stock writer writes it for tensors in this order."""
    entries: dict[str, Any] = {} if metadata is None else {METADATA: dict(metadata)}
    place = 0
    for tensor in tensors:
        offsets = [place, place + tensor.content.size]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        place = offsets[1]
    raw = json.dumps(entries, separators=(",", ":")).encode()
    return with_prefix(raw + b" " * (-len(raw) % _ALIGNMENT))


def with_prefix(header: bytes) -> bytes:
    """A header behind the number that says how long it is."""
    return len(header).to_bytes(PREFIX, "little") + header


def _padded(header: bytes, tensors: Sequence[NewTensor]) -> bytes:
    """Blanks after the header (the format allows them) let the data lie in its blocks as in the file it comes from.

    Only then can a file system share them. It is done on all, so that the bytes do not depend on where it is run.
    """
    place, best, blanks = len(header), _WORTH_SHARING - 1, 0
    for piece in joined(tensor.content for tensor in tensors):
        if isinstance(piece, Range) and piece.size > best:
            best, blanks = piece.size, (piece.start - place) % PAGE
        place += piece.size
    # Tensors would lose their alignment.
    return header if blanks % _ALIGNMENT else with_prefix(header[PREFIX:] + b" " * blanks)
