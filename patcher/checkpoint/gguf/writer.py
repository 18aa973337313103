"""GGUF files, placed: a new header, and tensor data that is moved by the kernel or is a few rows."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from patcher.checkpoint.copying import copy_range
from patcher.checkpoint.gguf.format import ARRAY, MAGIC, MAX_NAME, U8, padded, row_bytes
from patcher.checkpoint.gguf.pieces import Bytes, NewEntry, Padding, Piece, Placed, Range, Rows, joined, packed_text
from patcher.errors import OutsideError

PAGE = 4096
"""File systems share blocks between files, and insert them, in units of this (or less)."""

FILLER = "steering.filler"


@dataclass(frozen=True)
class Written:
    """What was written: bytes copied from other files, and bytes that are new."""

    copied: int
    new: int


def header_pieces(
    version: int, alignment: int, entries: Sequence[NewEntry], tensors: Sequence[Placed], *, like: int | None = None
) -> list[Piece]:
    """The header, up to where the data begins.

    Args:
        version: of the format.
        alignment: of the tensors' offsets.
        entries: the metadata; a filler among them is left out.
        tensors: in the order of their data.
        like: make the data begin at this offset, or a whole number of pages after it, by a filler entry.
    """
    entries = [entry for entry in entries if entry.key != FILLER]
    infos = b"".join(_infos(tensors, alignment))
    size = sum(_entry_size(entry) for entry in entries) + 24 + len(infos)
    filler = []
    if like is not None and padded(size, alignment) != like:
        least = size + _entry_size(_filler(0))
        step = max(PAGE, alignment)
        begin = like + max(0, -(-(least - like) // step)) * step
        filler = [_filler(begin - least)]
        size = begin
    count = len(entries) + len(filler)
    pieces: list[Piece] = [Bytes(MAGIC + struct.pack("<IQQ", version, len(tensors), count))]
    for entry in [*entries, *filler]:
        pieces += [Bytes(packed_text(entry.key)), entry.raw]
    pieces.append(Bytes(infos))
    if tensors:
        pieces.append(Padding(padded(size, alignment) - size))
    return pieces


def offsets(tensors: Sequence[Placed], alignment: int) -> list[int]:
    """Where each tensor's data begins, from the beginning of the data."""
    found, offset = [], 0
    for tensor in tensors:
        found.append(offset)
        offset = padded(offset + tensor.size, alignment)
    return found


def read_pieces(pieces: Sequence[Piece]) -> bytes:
    """The bytes of a header's pieces.

    Raises:
        OutsideError: a file that is copied from became shorter.
    """
    target = io.BytesIO()
    for piece in pieces:
        if isinstance(piece, Range):
            with piece.file.open("rb") as reader:
                reader.seek(piece.start)
                raw = reader.read(piece.size)
            if len(raw) < piece.size:
                raise _shorter(piece.file)
            target.write(raw)
        elif isinstance(piece, Bytes):
            target.write(piece.data)
        else:
            target.write(bytes(piece.size))
    return target.getvalue()


def write_gguf(
    target: BinaryIO,
    *,
    version: int,
    alignment: int,
    entries: Sequence[NewEntry],
    tensors: Sequence[Placed],
    like: int | None = None,
) -> Written:
    """Write a whole GGUF file into ``target``, which is empty.

    Memory does not depend on the size of the tensors. For the arguments see :func:`header_pieces`.

    Raises:
        OutsideError: a file that is copied from became shorter.
    """
    pieces = header_pieces(version, alignment, entries, tensors, like=like)
    for tensor in tensors:
        pieces += tensor.pieces
        pieces.append(Padding(padded(tensor.size, alignment) - tensor.size))
    with ExitStack() as stack:
        return _write(target, list(joined(pieces)), stack)


def _write(target: BinaryIO, pieces: Sequence[Piece], stack: ExitStack) -> Written:
    copied = new = 0
    opened: dict[Path, BinaryIO] = {}
    for piece in pieces:
        if isinstance(piece, (Bytes, Padding)):
            target.write(piece.data if isinstance(piece, Bytes) else bytes(piece.size))
            new += piece.size
            continue
        if piece.file not in opened:
            opened[piece.file] = stack.enter_context(piece.file.open("rb"))
        copied += piece.size
        if isinstance(piece, Range):
            _copy(opened[piece.file], target, piece)
        else:
            _copy_rows(opened[piece.file], target, piece)
    return Written(copied, new)


def _copy(reader: BinaryIO, writer: BinaryIO, piece: Range) -> None:
    # File systems share whole blocks only: what comes before the first is copied by itself.
    head = min(-piece.start % PAGE, piece.size)
    done = copy_range(reader, writer, piece.start, head)
    done += copy_range(reader, writer, piece.start + head, piece.size - head)
    if done < piece.size:
        raise _shorter(piece.file)


def _copy_rows(reader: BinaryIO, writer: BinaryIO, piece: Rows) -> None:
    width, group = piece.row_bytes, piece.row_bytes * len(piece.order)
    for number in range(piece.groups):
        reader.seek(piece.start + number * group)
        rows = reader.read(group)
        if len(rows) < group:
            raise _shorter(piece.file)
        writer.write(b"".join(rows[place * width : (place + 1) * width] for place in piece.order))


def _infos(tensors: Sequence[Placed], alignment: int) -> Iterator[bytes]:
    for tensor, offset in zip(tensors, offsets(tensors, alignment), strict=True):
        expected = row_bytes(tensor.type, tensor.shape[0]) * math.prod(tensor.shape[1:])
        if len(tensor.name.encode()) > MAX_NAME or tensor.size != expected:
            raise ValueError(f"{tensor.name}: {tensor.size} bytes for {tensor.shape} of type {tensor.type}")
        rank = len(tensor.shape)
        yield packed_text(tensor.name) + struct.pack(f"<I{rank}QIQ", rank, *tensor.shape, tensor.type, offset)


def _filler(size: int) -> NewEntry:
    return NewEntry(FILLER, Bytes(struct.pack("<IIQ", ARRAY, U8, size) + bytes(size)))


def _entry_size(entry: NewEntry) -> int:
    return len(packed_text(entry.key)) + entry.raw.size


def _shorter(file: Path) -> OutsideError:
    return OutsideError(
        "the source became shorter while it was copied; nothing is left of the output",
        where=str(file),
        remedy="run it again when nothing else writes to that file",
        code="disk",
    )
