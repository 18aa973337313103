"""Files that appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

_PARTIAL = ".partial"


@contextlib.contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A path beside ``path`` to write a file at; it becomes ``path`` when the block ends without an error.

    Until then what was at ``path`` stays as it is. On an error nothing is left of the new file. A process that is
    killed leaves it; :func:`is_partial` knows it by its name.

    Args:
        path: in a folder that is there.
        durable: the content reaches the disk before the name does. A cache, which looks at what it reads, need not
            wait for that.

    Raises:
        OSError: the disk failed.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PARTIAL}")
    try:
        yield partial
        if durable:
            with partial.open("rb") as written:
                os.fsync(written.fileno())
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def is_partial(path: Path) -> bool:
    """Whether a file has the name of one that was not finished."""
    return path.name.endswith(_PARTIAL)


def settle(path: Path) -> None:
    """A file or all of a folder to the disk, and readable like others: safetensors makes its own with mode 0600.

    Raises:
        OSError: the disk failed.
    """
    for item in [path, *path.rglob("*")]:
        if item.is_file():
            # A hard link is another file too, and keeps its mode.
            if item.stat().st_nlink == 1:
                item.chmod(0o644)
            with item.open("rb") as file:
                os.fsync(file.fileno())
        elif item.is_dir():
            sync_folder(item)


def sync_folder(folder: Path) -> None:
    """The names in a folder to the disk.

    Raises:
        OSError: the disk failed.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems do not sync folders; a rename is still atomic there.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
