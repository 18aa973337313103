"""A GGUF file patched where it lies: pages are inserted in front of the data, which does not move on the disk.

Everything that is to be written is in a journal beside the file before the file is touched. So an interrupted patch is
finished by the next one. Until then the file begins with zeros, which nothing loads.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from patcher.checkpoint.gguf.format import GgufFile
from patcher.checkpoint.gguf.model import split_parts
from patcher.checkpoint.gguf.writer import NewGgufFile
from patcher.checkpoint.pieces import Bytes, read_pieces
from patcher.disk.whole_files import sync_folder
from patcher.errors import InputError, OutsideError

_INSERT_RANGE = 0x20
_MOST_PADDING = 1 << 20
_COPY = "write a copy: leave out --in-place and name an output"


@dataclass(frozen=True)
class _Change:
    """What is to be done to a file: bytes to insert at its beginning, then what is written where."""

    size: int
    insert: int
    writes: tuple[tuple[int, bytes], ...]

    @property
    def final(self) -> int:
        return max(self.size + self.insert, *(start + len(data) for start, data in self.writes))


def patch_files_in_place(files: Sequence[tuple[GgufFile, NewGgufFile]]) -> int:
    """Give files new metadata, and tensors that are new or changed; the others' bytes stay where they are.

    Args:
        files: each with what it becomes: other metadata, its own tensors in its order, some of them with other bytes,
            and new ones after them. The model's first file comes first.

    Returns:
        How many bytes were written.

    Raises:
        InputError: a file is a link, or has other names, whose owners would see it change.
        OutsideError: it is in use, or its file system cannot insert bytes.
    """
    with contextlib.ExitStack() as stack:
        changes = []
        for source, new in files:
            _check_names(source.path)
            file = stack.enter_context(_locked(source.path))
            if os.fstat(file.fileno()).st_size != source.size:
                raise _in_use(source.path)
            changes.append((file, source.path, _change(source, new)))
            _check_file_system(source.path, changes[-1][2].insert)
        # From the first file's journal on, all of it is done; until then nothing is.
        for _file, path, change in reversed(changes):
            _save(_journal(path), change)
        for file, path, change in reversed(changes):
            _apply(file, path, change)
    return sum(len(data) for _file, _path, change in changes for _start, data in change.writes)


def _change(source: GgufFile, new: NewGgufFile) -> _Change:
    header = read_pieces(new.header())
    writes = [(0, header)]
    for tensor, offset in zip(new.tensors, new.offsets(), strict=True):
        if isinstance(tensor.content, Bytes):
            writes.append((len(header) + offset, tensor.content.data))
    insert = len(header) - source.data_start if source.tensors else 0
    return _Change(source.size, insert, tuple(writes))


def finish_interrupted(path: Path) -> list[Path]:
    """Finish what an interrupted patch in place began, in this file or in the files of its model.

    Returns:
        The files that were finished.

    Raises:
        InputError: a file is a link, or has other names: no patch in place began with such a file.
        OutsideError: they cannot be.
    """
    parts = split_parts(path) or [path]
    changes = {part: _load(_journal(part)) for part in parts}
    if changes[parts[0]] is None:
        # It was not agreed upon, so that no file was touched.
        for part in parts:
            _journal(part).unlink(missing_ok=True)
        return []
    finished = []
    for part in reversed(parts):
        change = changes[part]
        if change is not None:
            _check_names(part)
            with _locked(part) as file:
                _apply(file, part, change)
            finished.append(part)
    return finished


def _apply(file: BinaryIO, path: Path, change: _Change) -> None:
    journal = _journal(path)
    size = os.fstat(file.fileno()).st_size
    if size == change.size and change.insert:
        try:
            _insert(file.fileno(), change.insert)
        except OSError as error:
            raise OutsideError(
                "the file system did not insert the bytes; the file is as it was",
                where=str(path),
                found=os.strerror(error.errno or 0),
                remedy=f"remove {journal.name}, and {_COPY}",
                code="disk",
            ) from None
    elif not change.size + change.insert <= size <= change.final:
        raise OutsideError(
            "an interrupted patch cannot be finished: the file changed meanwhile",
            where=str(path),
            found=f"{size} bytes",
            remedy=f"download or convert it again, and remove {journal.name}",
            code="disk",
        )
    for start, data in change.writes:
        file.seek(start)
        file.write(data)
    file.flush()
    os.fsync(file.fileno())
    journal.unlink()
    sync_folder(path.parent)


def _insert(descriptor: int, size: int) -> None:
    try:
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    except (OSError, AttributeError):
        raise OSError(errno.EOPNOTSUPP, "no fallocate") from None
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if fallocate(descriptor, _INSERT_RANGE, 0, size) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _check_file_system(path: Path, insert: int) -> None:
    """Try it on a file beside it, so that nothing has changed where it fails."""
    if not insert:
        return
    with tempfile.TemporaryFile(dir=path.parent) as probe:
        probe.truncate(2 * insert)
        try:
            _insert(probe.fileno(), insert)
        except OSError as error:
            raise OutsideError(
                "this file system cannot insert bytes into a file (ext4 and xfs can)",
                where=str(path),
                found=os.strerror(error.errno or 0),
                remedy=_COPY,
                code="disk",
            ) from None


def _check_names(path: Path) -> None:
    links = path.lstat()
    if path.is_symlink() or links.st_nlink > 1:
        found = f"a link to {path.resolve()}" if path.is_symlink() else f"{links.st_nlink} names (hard links)"
        raise InputError(
            "this file has other names, under which it would change too", where=str(path), found=found, remedy=_COPY
        )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    with path.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(path) from None
        except OSError:
            # Not every file system has locks.
            pass
        yield file


def _in_use(path: Path) -> OutsideError:
    return OutsideError(
        "something else writes to this file", where=str(path), remedy="run it again when it is done", code="disk"
    )


def _journal(path: Path) -> Path:
    return path.with_name(f".{path.name}.steering-journal")


def _save(journal: Path, change: _Change) -> None:
    payload = b"".join(data for _start, data in change.writes)
    head = {
        "size": change.size,
        "insert": change.insert,
        "writes": [[start, len(data)] for start, data in change.writes],
        "sha256": hashlib.sha256(payload).hexdigest(),
    }
    try:
        with journal.open("wb") as file:
            file.write(json.dumps(head).encode() + b"\n" + payload)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        journal.unlink(missing_ok=True)
        raise
    sync_folder(journal.parent)


def _load(journal: Path) -> _Change | None:
    """The change that a journal holds; None if there is none, not all of it, or none that a patch can be."""
    if not journal.is_file():
        return None
    head, _line, payload = journal.read_bytes().partition(b"\n")
    try:
        words = json.loads(head)
        if hashlib.sha256(payload).hexdigest() != words["sha256"]:
            return None
        writes, at = [], 0
        for start, length in words["writes"]:
            writes.append((start, payload[at : at + length]))
            at += length
        change = _Change(words["size"], words["insert"], tuple(writes))
        return change if at == len(payload) and _is_sound(change, len(payload)) else None
    except (ValueError, KeyError, TypeError, RecursionError, ArithmeticError):
        return None


def _is_sound(change: _Change, new: int) -> bool:
    """Whether a patch with ``new`` bytes can be this one: what is inserted is written, and new tensors end the file."""
    numbers = [change.size, change.insert, *(start for start, _data in change.writes)]
    return (
        bool(change.writes)
        and all(type(number) is int and number >= 0 for number in numbers)
        and change.insert <= new
        and change.final <= change.size + change.insert + new + _MOST_PADDING
    )
