"""A file is read once: what checks a recipe early reads what the work itself asks for later."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_MOST = 32
_kept: dict[Any, Any] = {}


def read_once(source: object, base_folder: Path, key: object, read: Callable[[], T]) -> T:
    """What ``read`` makes of a file, which is read again when it has changed.

    Args:
        source: the path that the recipe gives; anything else than that of a file is read each time.
        base_folder: the recipe's folder.
        key: what else ``read`` goes by; with a ``repr`` that says it.
    """
    if not isinstance(source, str):
        return read()
    try:
        path = (base_folder / Path(source).expanduser()).resolve()
        there = path.stat()
    except (OSError, ValueError, RuntimeError):
        return read()
    name = (str(path), there.st_ino, there.st_size, there.st_mtime_ns, there.st_ctime_ns, source, repr(key))
    if name not in _kept:
        found = read()
        while len(_kept) >= _MOST:
            del _kept[next(iter(_kept))]
        _kept[name] = found
    result: T = _kept[name]
    return result
