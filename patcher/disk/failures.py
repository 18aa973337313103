"""Failures of the disk, in words."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from patcher.errors import OutsideError

_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.ENAMETOOLONG,
    errno.EBUSY, errno.ESTALE,
)  # fmt: skip
_REMEDIES = {
    errno.ENOSPC: "free some space, or write to another disk with --output",
    errno.EDQUOT: "free some of your quota, or write to another disk with --output",
    errno.EFBIG: "raise the file size limit (ulimit -f), or write to another disk with --output",
    errno.ENAMETOOLONG: "choose a shorter name with --output",
}


@contextlib.contextmanager
def disk_errors(place: Path, what: str = "the output") -> Iterator[None]:
    """Say a failure of the disk in words.

    Args:
        place: named where the error itself names no file.
        what: is being written.

    Raises:
        OutsideError: for a full, read-only or forbidden disk.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _ERRORS:
            raise
        raise _in_words(what, error.errno, str(error.filename or place)) from None
    except SafetensorError as error:
        # It is no OSError, and names the number only in its text.
        match = re.search(r"os error (\d+)", str(error))
        if match is None or int(match.group(1)) not in _ERRORS:
            raise
        raise _in_words(what, int(match.group(1)), str(place)) from None


@contextlib.contextmanager
def told_as(message: str, where: Path) -> Iterator[None]:
    """Say any failure of the disk with a message.

    Raises:
        OutsideError: for every ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise OutsideError(message, where=str(where), found=error, code="disk") from None


def require_writable(folder: Path) -> None:
    """Refuse, before any work, a place in which no output can be made.

    Args:
        folder: the output's parent, or the nearest folder above it that is there.

    Raises:
        OutsideError: the disk is read-only, or the folder may not be written to.
    """
    if not os.access(folder, os.W_OK | os.X_OK):
        read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
        raise _in_words("the output", errno.EROFS if read_only else errno.EACCES, str(folder))


def remove_folder(folder: Path) -> None:
    """Remove a folder as far as that can be done, also one that holds an output which was made read-only."""
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        return
    with contextlib.suppress(OSError):
        folder.chmod(0o700)
        for place, names, _files in os.walk(folder):
            for item in (Path(place) / name for name in names):
                if not item.is_symlink():
                    item.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def _in_words(what: str, number: int, where: str) -> OutsideError:
    return OutsideError(
        f"{what} could not be written, and nothing of it is left",
        where=where,
        found=os.strerror(number),
        remedy=_REMEDIES.get(number, "check the permissions, or write elsewhere with --output"),
        code="disk",
    )
