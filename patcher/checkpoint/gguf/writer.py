"""GGUF files, placed: a new header, and tensor data that is moved by the kernel or is a few rows."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from patcher.checkpoint.copying import PAGE
from patcher.checkpoint.gguf.format import (
    ARRAY,
    FLOAT32,
    I32,
    MAGIC,
    MAX_NAME,
    STRING,
    U8,
    U32,
    Entry,
    GgufFile,
    GgufTensor,
    padded,
    row_bytes,
)
from patcher.checkpoint.pieces import Appended, Bytes, Padding, Piece, Range, append_pieces

FILLER = "steering.filler"


@dataclass(frozen=True)
class NewGgufTensor:
    """A tensor of the output: its name, ggml shape and type, and what its data is made of."""

    name: str
    shape: tuple[int, ...]
    type: int
    content: Piece

    @property
    def size(self) -> int:
        return self.content.size


@dataclass(frozen=True)
class NewEntry:
    """A metadata entry of the output: ``raw`` holds its type word and value, or says where they lie."""

    key: str
    raw: Piece


def text_entry(key: str, text: str) -> NewEntry:
    return NewEntry(key, Bytes(struct.pack("<I", STRING) + _packed_text(text)))


def i32_entry(key: str, number: int) -> NewEntry:
    return NewEntry(key, Bytes(struct.pack("<Ii", I32, number)))


def u32_entry(key: str, number: int) -> NewEntry:
    return NewEntry(key, Bytes(struct.pack("<II", U32, number)))


def floats_entry(key: str, raw: bytes) -> NewEntry:
    """An array of fp32 numbers, given as their bytes."""
    return NewEntry(key, Bytes(struct.pack("<IIQ", ARRAY, FLOAT32, len(raw) // 4) + raw))


def kept_entry(entry: Entry, file: GgufFile, key: str | None = None) -> NewEntry:
    """An entry of another file, byte for byte, under its own or another key."""
    return NewEntry(key or entry.name, Range(file.path, entry.start, entry.end - entry.start))


def kept_tensor(tensor: GgufTensor, name: str | None = None) -> NewGgufTensor:
    """A tensor of another file, byte for byte, under its own or another name."""
    return NewGgufTensor(name or tensor.name, tensor.shape, tensor.type, Range(tensor.file, tensor.start, tensor.size))


@dataclass(frozen=True)
class NewGgufFile:
    """A GGUF file that is to be written.

    Attributes:
        version: of the format.
        alignment: of the tensors' offsets.
        entries: the metadata; a filler among them is left out.
        tensors: in the order of their data.
        like: the data begins at this offset, or a whole number of pages after it, by a filler entry; None: anywhere.
    """

    version: int
    alignment: int
    entries: Sequence[NewEntry]
    tensors: Sequence[NewGgufTensor]
    like: int | None = None

    def write(self, target: BinaryIO) -> Appended:
        """Write it into ``target``, which is empty. Memory does not depend on the size of the tensors.

        Raises:
            OutsideError: a file that is copied from became shorter.
        """
        pieces = self.header()
        for tensor in self.tensors:
            pieces += [tensor.content, Padding(padded(tensor.size, self.alignment) - tensor.size)]
        return append_pieces(target, pieces)

    def header(self) -> list[Piece]:
        """The header, up to where the data begins."""
        entries = [entry for entry in self.entries if entry.key != FILLER]
        infos = b"".join(self._infos())
        size = sum(_entry_size(entry) for entry in entries) + 24 + len(infos)
        if self.like is not None and padded(size, self.alignment) != self.like:
            least = size + _entry_size(_filler(0))
            step = max(PAGE, self.alignment)
            size = self.like + max(0, -(-(least - self.like) // step)) * step
            entries.append(_filler(size - least))
        pieces: list[Piece] = [Bytes(MAGIC + struct.pack("<IQQ", self.version, len(self.tensors), len(entries)))]
        for entry in entries:
            pieces += [Bytes(_packed_text(entry.key)), entry.raw]
        pieces.append(Bytes(infos))
        if self.tensors:
            pieces.append(Padding(padded(size, self.alignment) - size))
        return pieces

    def offsets(self) -> list[int]:
        """Where each tensor's data begins, from the beginning of the data."""
        found, offset = [], 0
        for tensor in self.tensors:
            found.append(offset)
            offset = padded(offset + tensor.size, self.alignment)
        return found

    def _infos(self) -> Iterator[bytes]:
        for tensor, offset in zip(self.tensors, self.offsets(), strict=True):
            expected = row_bytes(tensor.type, tensor.shape[0]) * math.prod(tensor.shape[1:])
            if len(tensor.name.encode()) > MAX_NAME or tensor.size != expected:
                raise ValueError(f"{tensor.name}: {tensor.size} bytes for {tensor.shape} of type {tensor.type}")
            rank = len(tensor.shape)
            yield _packed_text(tensor.name) + struct.pack(f"<I{rank}QIQ", rank, *tensor.shape, tensor.type, offset)


def _filler(size: int) -> NewEntry:
    return NewEntry(FILLER, Bytes(struct.pack("<IIQ", ARRAY, U8, size) + bytes(size)))


def _entry_size(entry: NewEntry) -> int:
    return len(_packed_text(entry.key)) + entry.raw.size


def _packed_text(text: str) -> bytes:
    """A text as the format has it."""
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
