"""How much memory a case may take: the process has no room for more, and each case is measured."""

from __future__ import annotations

import resource
from pathlib import Path

ROOM = 256 << 20
"""Bytes of address space beside what a process starts with. No case is larger than some hundred kilobytes."""

MOST_OF_A_CASE = 96 << 20
"""Bytes by which a case may raise the process's peak of memory in use."""


def limit_memory(room: int = ROOM) -> None:
    """No more address space for this process than it has now, and ``room`` bytes."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + room, resource.getrlimit(resource.RLIMIT_AS)[1]))


def peak_bytes() -> int:
    """The most memory that this process has had in use; not `ru_maxrss`, which begins with that of its parent."""
    status = Path("/proc/self/status").read_bytes()
    return int(status.partition(b"VmHWM:")[2].split(maxsplit=1)[0]) * 1024
