"""A safetensors file put together from tensors of other files: the kernel copies the bytes, only the header is new."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from patcher.checkpoint.copying import PAGE, append_range
from patcher.checkpoint.safetensors_file import TensorInfo
from patcher.checkpoint.safetensors_writer import packed_header
from patcher.errors import OutsideError

_PREFIX = 8
_WORTH_SHARING = 1 << 20
_METADATA = "__metadata__"


@dataclass(frozen=True)
class Piece:
    """One tensor of the new file.

    Attributes:
        name: its key.
        dtype: safetensors dtype.
        shape: its shape.
        size: its bytes.
        file: where they lie, from ``start`` on; None where they are made.
        make: gives them, in parts.
    """

    name: str
    dtype: str
    shape: Sequence[int]
    size: int
    file: Path | None = None
    start: int = 0
    make: Callable[[], Iterable[memoryview | bytes]] | None = None

    @classmethod
    def of(cls, info: TensorInfo, name: str) -> Piece:
        """A tensor of another file, under a name that may be new."""
        return cls(name, info.dtype, info.shape, info.end - info.start, info.file, info.start)


@dataclass(frozen=True)
class Assembled:
    """What was written: the file's size, and how many of its bytes are shared with other files."""

    size: int
    shared: int


def assemble(
    target: Path,
    metadata: Mapping[str, str] | None,
    pieces: Sequence[Piece],
    *,
    header: bytes | None = None,
    pad: bool = True,
) -> Assembled:
    """Write the pieces, in this order, as one new safetensors file, mode 0644.

    Args:
        target: a file that does not exist.
        metadata: the header's; None leaves the key out.
        pieces: its tensors.
        header: the whole header (length prefix included), instead of one that is made here.
        pad: a header that is made here may end in blanks, so that blocks can be shared.

    Raises:
        OutsideError: a file that is copied from became shorter.
    """
    if header is None:
        header = canonical_header(metadata, pieces)
        header = _padded(header, pieces) if pad else header
    size, shared = len(header), 0
    with target.open("xb") as writer, ExitStack() as stack:
        opened: dict[Path, BinaryIO] = {}
        writer.write(header)
        for piece in _runs(pieces):
            if piece.file is None:
                assert piece.make is not None
                size += sum(writer.write(part) for part in piece.make())
                continue
            if piece.file not in opened:
                opened[piece.file] = stack.enter_context(piece.file.open("rb"))
            done, alike = append_range(opened[piece.file], writer, piece.start, piece.size)
            if done < piece.size:
                raise OutsideError(
                    "the file became shorter while it was copied; nothing is left of the output",
                    where=str(piece.file),
                    remedy="run it again when nothing else writes to that file",
                    code="disk",
                )
            size, shared = size + done, shared + alike
    target.chmod(0o644)
    return Assembled(size, shared)


def canonical_header(metadata: Mapping[str, str] | None, pieces: Iterable[Piece]) -> bytes:
    """The header, length prefix included, as the stock writer writes it for tensors in this order."""
    entries: dict[str, Any] = {} if metadata is None else {_METADATA: dict(metadata)}
    place = 0
    for piece in pieces:
        offsets = [place, place + piece.size]
        entries[piece.name] = {"dtype": piece.dtype, "shape": list(piece.shape), "data_offsets": offsets}
        place += piece.size
    return packed_header(entries)


def raw_header(path: Path) -> bytes:
    """A safetensors file's header, length prefix included, byte for byte."""
    with path.open("rb") as file:
        prefix = file.read(_PREFIX)
        return prefix + file.read(int.from_bytes(prefix, "little"))


def metadata_of(header: bytes) -> dict[str, str] | None:
    """The metadata of a raw header."""
    found: dict[str, str] | None = json.loads(header[_PREFIX:]).get(_METADATA)
    return found


def in_file_order(tensors: Iterable[TensorInfo]) -> list[TensorInfo]:
    """Tensors of one file as they lie in it."""
    return sorted(tensors, key=lambda info: (info.start, info.end))


def _padded(header: bytes, pieces: Sequence[Piece]) -> bytes:
    """Blanks after the header (the format allows them) let the data lie in its blocks as in the file it comes from.

    Only then can a file system share them. It is done on all, so that the bytes do not depend on where it is run.
    """
    place, best, wanted = len(header), 0, len(header)
    for run in _runs(pieces):
        if run.file is not None and run.size >= _WORTH_SHARING and run.size > best:
            best, wanted = run.size, len(header) + (run.start - place) % PAGE
        place += run.size
    if wanted % _PREFIX:
        # Tensors would lose their alignment.
        return header
    body = header[_PREFIX:] + b" " * (wanted - len(header))
    return len(body).to_bytes(_PREFIX, "little") + body


def _runs(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Pieces that follow each other in one file, joined."""
    run: Piece | None = None
    for piece in pieces:
        if run is not None and run.file is not None and run.file == piece.file and run.start + run.size == piece.start:
            run = Piece(run.name, run.dtype, run.shape, run.size + piece.size, run.file, run.start)
            continue
        if run is not None:
            yield run
        run = piece
    if run is not None:
        yield run
