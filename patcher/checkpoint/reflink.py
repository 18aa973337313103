"""Blocks that two files share until one of them is written to (reflinks), on file systems that have them.

Linux offers them as the ioctls FICLONE and FICLONERANGE (btrfs, xfs, bcachefs, overlayfs above one of them, NFS 4.2).
"""

from __future__ import annotations

import fcntl
import os
import struct
import sys
from typing import BinaryIO

_FICLONE = 0x40049409
_FICLONERANGE = 0x4020940D


def clone_file(reader: BinaryIO, writer: BinaryIO) -> bool:
    """Let an empty file share all of another's blocks; False, and ``writer`` still empty, where that cannot be done."""
    if sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
    except OSError:
        # Whatever the reason is, a copy that fails for it as well will say so.
        _cut(writer, 0)
        return False
    return True


def clone_range(reader: BinaryIO, writer: BinaryIO, start: int, size: int, place: int) -> bool:
    """Let ``writer`` share ``size`` bytes from ``start`` on at ``place``, all of them multiples of a block."""
    if sys.platform != "linux":
        return False
    request = struct.pack("=qQQQ", reader.fileno(), start, size, place)
    try:
        fcntl.ioctl(writer.fileno(), _FICLONERANGE, request)
    except OSError:
        _cut(writer, place)
        return False
    return True


def _cut(writer: BinaryIO, size: int) -> None:
    """Take away what a failed attempt has left, if anything.

    Not otherwise: ext4 writes a file that was once cut to nothing to the disk when it is closed, and waits for that.
    """
    if os.fstat(writer.fileno()).st_size != size:
        writer.truncate(size)
