"""What a GGUF file that is to be written is made of: bytes that are new, and bytes that lie in other files."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from patcher.checkpoint.gguf.format import ARRAY, FLOAT32, I32, STRING, U32, Entry, GgufFile, GgufTensor


@dataclass(frozen=True)
class Range:
    """Bytes of a file, unchanged."""

    file: Path
    start: int
    size: int


@dataclass(frozen=True)
class Bytes:
    """Bytes that are new."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)


@dataclass(frozen=True)
class Rows:
    """Rows of a file in another order, group by group.

    Attributes:
        file: the file.
        start: of the first row.
        row_bytes: of one row.
        order: for each row of a group in the output, its place in the group in the file.
        groups: how many groups follow each other.
    """

    file: Path
    start: int
    row_bytes: int
    order: tuple[int, ...]
    groups: int

    @property
    def size(self) -> int:
        return self.row_bytes * len(self.order) * self.groups


@dataclass(frozen=True)
class Padding:
    """Bytes that nobody reads, between two tensors."""

    size: int


Piece = Range | Bytes | Rows | Padding


@dataclass(frozen=True)
class Placed:
    """A tensor of the output: its name, ggml shape and type, and what its data is made of."""

    name: str
    shape: tuple[int, ...]
    type: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)


@dataclass(frozen=True)
class NewEntry:
    """A metadata entry of the output: ``raw`` holds its type word and value, or says where they lie."""

    key: str
    raw: Piece


def text_entry(key: str, text: str) -> NewEntry:
    return NewEntry(key, Bytes(struct.pack("<I", STRING) + packed_text(text)))


def i32_entry(key: str, number: int) -> NewEntry:
    return NewEntry(key, Bytes(struct.pack("<Ii", I32, number)))


def u32_entry(key: str, number: int) -> NewEntry:
    return NewEntry(key, Bytes(struct.pack("<II", U32, number)))


def floats_entry(key: str, raw: bytes) -> NewEntry:
    """An array of fp32 numbers, given as their bytes."""
    return NewEntry(key, Bytes(struct.pack("<IIQ", ARRAY, FLOAT32, len(raw) // 4) + raw))


def kept_entry(entry: Entry, file: GgufFile, key: str | None = None) -> NewEntry:
    """An entry of another file, byte for byte, under its own or another key."""
    return NewEntry(key or entry.key, Range(file.path, entry.start, entry.end - entry.start))


def kept_tensor(tensor: GgufTensor, name: str | None = None) -> Placed:
    """A tensor of another file, byte for byte, under its own or another name."""
    return Placed(name or tensor.name, tensor.shape, tensor.type, (Range(tensor.file, tensor.start, tensor.size),))


def joined(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """The same bytes in as few copies as possible; padding between two tensors that stay neighbours is copied too."""
    waiting: Range | None = None
    padding = 0
    for piece in pieces:
        if piece.size == 0:
            continue
        if waiting is not None:
            if isinstance(piece, Padding):
                padding += piece.size
                continue
            end = waiting.start + waiting.size + padding
            if isinstance(piece, Range) and piece.file == waiting.file and piece.start == end:
                waiting = Range(waiting.file, waiting.start, waiting.size + padding + piece.size)
                padding = 0
                continue
            yield waiting
            yield Padding(padding)
            waiting, padding = None, 0
        if isinstance(piece, Range):
            waiting = piece
        else:
            yield piece
    if waiting is not None:
        yield waiting
        yield Padding(padding)


def packed_text(text: str) -> bytes:
    """A text as the format has it."""
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
