"""Bytes that do not change, placed by the kernel: linked, shared, or copied without passing through Python.

Some file systems let files share blocks until one of them is written to (reflinks). Linux offers that as the ioctls
FICLONE and FICLONERANGE (btrfs, xfs, bcachefs, overlayfs above one of them, NFS 4.2).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

How = Literal["hard_link", "reflink", "copy_file_range", "read_write"]

_STEP = 1 << 30
_PIECE = 1 << 22

PAGE = 4096
"""File systems share blocks between files in units of this (or less)."""

_FICLONE = 0x40049409
_FICLONERANGE = 0x4020940D
_UNSUPPORTED = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EBADF)
_NO_LINK = {
    errno.EXDEV: "the base is on another disk",
    errno.EMLINK: "a file of the base has as many links as its file system allows",
    errno.EPERM: "hard links to the base's files are not permitted here",
    errno.EACCES: "hard links to the base's files are not permitted here",
    errno.EOPNOTSUPP: "the file system has no hard links",
    errno.ENOSYS: "the file system has no hard links",
}


@dataclass(frozen=True)
class Placed:
    """How one file came to be where it is.

    Attributes:
        how: ``hard_link`` (it is the source's file), ``reflink`` (a file of its own that shares the source's blocks
            until one of them is written to), ``copy_file_range`` (copied inside of the kernel) or ``read_write``.
        size: its bytes.
        written: those of them that were written to the disk.
        not_linked: why there is no hard link although one was asked for.
    """

    how: How
    size: int
    written: int
    not_linked: str | None = None


def place_file(source: Path, target: Path, *, link: bool = False) -> Placed:
    """Put one file's content at ``target``, which does not exist, in the cheapest way that the file system has.

    Symlinks are followed, and folders made. A hard link keeps the source's mode, since the two are one file; all others
    get 0644.

    Args:
        link: make a hard link where that can be done; whatever writes to ``target`` later would write to ``source``.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    refused = _link(source, target) if link else None
    if link and refused is None:
        return Placed("hard_link", target.stat().st_size, 0)
    with source.open("rb") as reader, target.open("xb") as writer:
        size = os.fstat(reader.fileno()).st_size
        how: How = "reflink"
        done = 0
        if not clone_file(reader, writer):
            how = "copy_file_range"
            done, in_kernel = _copy(reader, writer, 0, size)
            if not in_kernel:
                how = "read_write"
            size = done
    target.chmod(0o644)
    return Placed(how, size, done, refused)


def append_range(reader: BinaryIO, writer: BinaryIO, start: int, size: int) -> tuple[int, int]:
    """Append ``size`` bytes of ``reader`` from ``start`` on; whole blocks are shared where both lie alike in theirs.

    Returns:
        The number of bytes appended, and how many of them are reflinks.
    """
    writer.flush()
    place = writer.seek(0, os.SEEK_END)
    head = min(-start % PAGE, size)
    middle = (size - head) // PAGE * PAGE
    if start % PAGE != place % PAGE or not middle:
        return _copy(reader, writer, start, size)[0], 0
    _copy(reader, writer, start, head)
    writer.flush()
    reflinked = middle if clone_range(reader, writer, start + head, middle, place + head) else 0
    writer.seek(0, os.SEEK_END)
    done, _in_kernel = _copy(reader, writer, start + head + reflinked, size - head - reflinked)
    return head + reflinked + done, reflinked


def clone_file(reader: BinaryIO, writer: BinaryIO) -> bool:
    """Let an empty file share all of another's blocks; False, and ``writer`` still empty, where that cannot be done."""
    return _share(writer, 0, _FICLONE, reader.fileno())


def clone_range(reader: BinaryIO, writer: BinaryIO, start: int, size: int, place: int) -> bool:
    """Let ``writer`` share ``size`` bytes from ``start`` on at ``place``, all of them multiples of a block."""
    return _share(writer, place, _FICLONERANGE, struct.pack("=qQQQ", reader.fileno(), start, size, place))


def read_range(path: Path, start: int, size: int) -> bytearray:
    """``size`` bytes of a file from ``start`` on, or fewer, where it ends before."""
    raw = bytearray(size)
    with path.open("rb") as file:
        file.seek(start)
        del raw[file.readinto(raw) :]
    return raw


def sha256_of(path: Path) -> str:
    """The file's SHA-256, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _link(source: Path, target: Path) -> str | None:
    """Make a hard link; why it could not be made."""
    try:
        # To what a symlink leads to: the Hub's cache is made of them, and linking one would only repeat it.
        target.hardlink_to(source.resolve(strict=True))
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        return _NO_LINK[error.errno]
    return None


def _share(writer: BinaryIO, size: int, request: int, argument: int | bytes) -> bool:
    """Ask for shared blocks in a file of ``size`` bytes, which it still has where the answer is no."""
    if sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(writer.fileno(), request, argument)
    except OSError:
        # Whatever the reason is, a copy that fails for it as well will say so. What the attempt left is cut, and
        # nothing else: ext4 writes a file that was once cut to nothing to the disk when it is closed, and waits for it.
        if os.fstat(writer.fileno()).st_size != size:
            writer.truncate(size)
        return False
    return True


def _copy(reader: BinaryIO, writer: BinaryIO, start: int, size: int) -> tuple[int, bool]:
    """Append; the number of bytes, and whether the kernel copied all of them."""
    done = 0
    if hasattr(os, "copy_file_range"):
        writer.flush()
        try:
            while done < size:
                # The writer's own position says where; it moves along.
                moved = os.copy_file_range(
                    reader.fileno(), writer.fileno(), min(_STEP, size - done), offset_src=start + done
                )
                if moved == 0:
                    break
                done += moved
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        writer.seek(0, os.SEEK_END)
    in_kernel = done == size
    reader.seek(start + done)
    while done < size:
        piece = reader.read(min(_PIECE, size - done))
        if not piece:
            break
        writer.write(piece)
        done += len(piece)
    return done, in_kernel
