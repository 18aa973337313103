"""The readers by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from support.fuzz.loop import Reader
from support.fuzz.watch import Case

READERS: dict[str, Reader] = {}

Read = Callable[[Path, Path], Any]


def reader(
    name: str,
    seeds: Callable[[], list[Case]],
    same: Callable[[Path, Any], None] = lambda _folder, _result: None,
    cost: int = 1,
) -> Callable[[Read], Read]:
    """Register a reader; see :class:`support.fuzz.loop.Reader`."""

    def register(read: Read) -> Read:
        READERS[name] = Reader(name, seeds, read, same, cost)
        return read

    return register


def each(name: str, *contents: Callable[[], bytes] | bytes) -> Callable[[], list[Case]]:
    """Cases of one file."""
    return lambda: [{name: content if isinstance(content, bytes) else content()} for content in contents]


def beside(folder: str, case: Mapping[str, bytes]) -> Case:
    """A case in a folder of the case."""
    return {f"{folder}/{name}": content for name, content in case.items()}
