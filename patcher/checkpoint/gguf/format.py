"""The GGUF format: types, limits, and what a file's header says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from patcher.errors import InputError

TENSOR_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18),
}  # fmt: skip
"""ggml type -> (name, elements in a block, bytes of a block)."""

F32 = 0
U8, I8, U16, I16, U32, I32, FLOAT32, BOOL, STRING, ARRAY, U64, I64, FLOAT64 = range(13)
SCALARS: Mapping[int, str] = {
    U8: "<B", I8: "<b", U16: "<H", I16: "<h", U32: "<I", I32: "<i", FLOAT32: "<f", BOOL: "<B", U64: "<Q", I64: "<q",
    FLOAT64: "<d",
}  # fmt: skip

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_NAME = 63
MAX_DIMS = 4

Scalar = int | float | bool | str


@dataclass(frozen=True)
class Entry:
    """One metadata entry.

    Attributes:
        name: its key.
        type: the value's type; of an array, its elements'.
        count: how many elements an array has; None for a scalar.
        start: where the type word lies in the file; ``end`` is where the value ends.
        scalar: the value; None for arrays and for texts beyond a mebibyte.
    """

    name: str
    type: int
    count: int | None
    start: int
    end: int
    scalar: Scalar | None


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies.

    Attributes:
        name: its name.
        shape: as ggml counts: the first number is the length of a row.
        type: the ggml type, a key of ``TENSOR_TYPES``.
        start: absolute byte offset in ``file``.
        size: bytes, without padding.
        file: the file.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    start: int
    size: int
    file: Path

    @property
    def row_bytes(self) -> int:
        """The bytes of one row."""
        return row_bytes(self.type, self.shape[0])

    @property
    def type_name(self) -> str:
        return TENSOR_TYPES[self.type][0]


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file's header.

    Attributes:
        path: the file.
        version: 2 or 3.
        alignment: of every tensor's offset.
        entries: the metadata, by key, in the file's order.
        tensors: by name, in the file's order, which is that of their offsets.
        data_start: absolute offset of the first tensor.
        size: of the file.
    """

    path: Path
    version: int
    alignment: int
    entries: Mapping[str, Entry]
    tensors: Mapping[str, GgufTensor]
    data_start: int
    size: int

    def scalar(self, key: str) -> Scalar | None:
        """The value of a scalar entry; None where there is none."""
        entry = self.entries.get(key)
        return None if entry is None else entry.scalar


def gguf_error(
    message: str, file: Path, place: str | None = None, found: object = None, *, remedy: str = "convert the model again"
) -> InputError:
    """The refusal of a GGUF file; ``place`` is the key or the tensor at fault."""
    return InputError(
        message, where=f"{file}: {place}" if place else str(file), found=found, remedy=remedy, code="gguf"
    )


def row_bytes(type_id: int, length: int) -> int:
    """The bytes of a row of ``length`` elements."""
    _name, elements, size = TENSOR_TYPES[type_id]
    return length // elements * size


def padded(size: int, alignment: int) -> int:
    """``size``, rounded up to the alignment."""
    return -(-size // alignment) * alignment
