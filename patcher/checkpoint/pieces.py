"""What a file that is to be written is made of: bytes that are new, and bytes that lie in other files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from patcher.checkpoint.copying import append_range, read_range
from patcher.checkpoint.safetensors_file import tensor_bytes
from patcher.errors import OutsideError

_AT_ONCE = 1 << 23
"""Bytes of slices that are held in memory."""


@dataclass(frozen=True)
class Range:
    """Bytes of a file, unchanged."""

    file: Path
    start: int
    size: int

    def parts(self) -> Iterator[bytearray]:
        raw = read_range(self.file, self.start, self.size)
        if len(raw) < self.size:
            raise _shorter(self.file)
        yield raw


@dataclass(frozen=True)
class Bytes:
    """Bytes that are new."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def parts(self) -> Iterator[bytes]:
        yield self.data


@dataclass(frozen=True)
class Made:
    """Bytes that are new, and made when they are written; ``make`` gives them in parts."""

    size: int
    make: Callable[[], Iterable[memoryview | bytes]]

    def parts(self) -> Iterator[memoryview | bytes]:
        yield from self.make()


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

    def parts(self) -> Iterator[bytes]:
        width, group = self.row_bytes, self.row_bytes * len(self.order)
        with self.file.open("rb") as reader:
            reader.seek(self.start)
            for _ in range(self.groups):
                rows = reader.read(group)
                if len(rows) < group:
                    raise _shorter(self.file)
                yield b"".join(rows[place * width : (place + 1) * width] for place in self.order)


@dataclass(frozen=True)
class Slices:
    """Groups of equal slices of a file in another order, with slices of zeros among them.

    Attributes:
        file: the file.
        start: of the first group.
        slice_bytes: of one slice.
        stored: how many slices a group has in the file.
        order: for each slice of a group in the output, its place in the group in the file; None for zeros.
        groups: how many groups follow each other.
    """

    file: Path
    start: int
    slice_bytes: int
    stored: int
    order: tuple[int | None, ...]
    groups: int

    @property
    def size(self) -> int:
        return self.slice_bytes * len(self.order) * self.groups

    def parts(self) -> Iterator[memoryview | bytes]:
        group = self.slice_bytes * self.stored
        at_once = _AT_ONCE // max(group, 1)
        with self.file.open("rb") as reader:
            if not at_once:
                for number in range(self.groups):
                    yield from self._one_by_one(reader, self.start + number * group)
                return
            reader.seek(self.start)
            places, sources = zip(*((at, one) for at, one in enumerate(self.order) if one is not None), strict=True)
            for first in range(0, self.groups, at_once):
                count = min(at_once, self.groups - first)
                stored = torch.frombuffer(self._read(reader, count * group), dtype=torch.uint8)
                wanted = torch.zeros(count, len(self.order), self.slice_bytes, dtype=torch.uint8)
                wanted[:, list(places)] = stored.view(count, self.stored, self.slice_bytes)[:, list(sources)]
                yield tensor_bytes(wanted)

    def _one_by_one(self, reader: BinaryIO, start: int) -> Iterator[bytes]:
        """A group that is too large to be held whole."""
        for one in self.order:
            reader.seek(start + (one or 0) * self.slice_bytes)
            for first in range(0, self.slice_bytes, _AT_ONCE):
                size = min(_AT_ONCE, self.slice_bytes - first)
                yield bytes(size) if one is None else bytes(self._read(reader, size))

    def _read(self, reader: BinaryIO, size: int) -> bytearray:
        raw = bytearray(reader.read(size))
        if len(raw) < size:
            raise _shorter(self.file)
        return raw


@dataclass(frozen=True)
class Padding:
    """Bytes that nobody reads, between two tensors."""

    size: int

    def parts(self) -> Iterator[bytes]:
        yield bytes(self.size)


Piece = Range | Bytes | Made | Rows | Slices | Padding


@dataclass(frozen=True)
class Appended:
    """What was written: bytes of other files, how many of them are reflinks, and bytes that are new."""

    copied: int
    reflinked: int
    new: int

    @property
    def size(self) -> int:
        return self.copied + self.new


def append_pieces(writer: BinaryIO, pieces: Iterable[Piece]) -> Appended:
    """Append the pieces to a file. Memory does not depend on the size of those that lie in other files.

    Raises:
        OutsideError: a file that is copied from became shorter.
    """
    copied = reflinked = new = 0
    opened: dict[Path, BinaryIO] = {}
    with ExitStack() as stack:
        for piece in joined(pieces):
            if isinstance(piece, Range):
                if piece.file not in opened:
                    opened[piece.file] = stack.enter_context(piece.file.open("rb"))
                done, alike = append_range(opened[piece.file], writer, piece.start, piece.size)
                if done < piece.size:
                    raise _shorter(piece.file)
                reflinked += alike
            else:
                writer.writelines(piece.parts())
            if isinstance(piece, (Range, Rows, Slices)):
                copied += piece.size
            else:
                new += piece.size
    return Appended(copied, reflinked, new)


def read_pieces(pieces: Iterable[Piece]) -> bytes:
    """The bytes of the pieces.

    Raises:
        OutsideError: a file that is copied from became shorter.
    """
    return b"".join(part for piece in pieces for part in piece.parts())


def joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
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
                waiting = Range(waiting.file, waiting.start, end + piece.size - waiting.start)
                padding = 0
                continue
            yield from (waiting, Padding(padding))
            waiting, padding = None, 0
        if isinstance(piece, Range):
            waiting = piece
        else:
            yield piece
    if waiting is not None:
        yield from (waiting, Padding(padding))


def _shorter(file: Path) -> OutsideError:
    return OutsideError(
        "the source became shorter while it was copied; nothing is left of the output",
        where=str(file),
        remedy="run it again when nothing else writes to that file",
        code="disk",
    )
