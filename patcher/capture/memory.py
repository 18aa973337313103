"""How much main memory this process can still use: the least of what the machine, its cgroups and its limits leave.

In a container the machine's free memory is not the container's, and under ``ulimit -v`` memory can be free and yet
not be had. Whatever of this cannot be read is left out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

FOR_WEIGHTS = 0.8
"""Of free memory, for weights; the rest is for activations."""
UNKNOWN = 8 << 30
"""Bytes that are taken to be there where nothing at all can be read."""
_ROOT = Path("/")
_UNLIMITED = 1 << 60  # cgroup v1 spells "none" as the largest multiple of a page below 2^63
_CGROUP_FILES = {
    1: (["memory.limit_in_bytes"], "memory.usage_in_bytes", ["total_inactive_file", "total_active_file"]),
    2: (["memory.max", "memory.high"], "memory.current", ["inactive_file", "active_file"]),
}
"""Version -> the files of the limits and of what is used, and the entries of memory.stat that count the file cache."""
_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class CgroupMount:
    """Where a cgroup hierarchy is to be seen.

    Attributes:
        version: 1 (the memory controller's) or 2.
        root: the cgroup that lies at ``place``; in a container not always the hierarchy's own root.
        place: the mount point.
    """

    version: int
    root: PurePosixPath
    place: PurePosixPath


def available_memory(root: Path = _ROOT, sysconf: Callable[[str], int] | None = None) -> int:
    """Bytes of main memory that this process can still use, swap not counted; never negative.

    The least of the machine's ``MemAvailable``, what every cgroup above the process (v1 or v2) leaves, and
    :func:`address_space_left`. Where there is no ``/proc`` (macOS): half of the physical memory, or what is free if
    the system says it.

    Args:
        root: what lies under ``/`` of the machine.
        sysconf: ``os.sysconf``, where there is one.
    """
    found = [meminfo_available(_text(root / "proc/meminfo")), *_cgroups_left(root), address_space_left(root)]
    known = [value for value in found if value is not None]
    if not known:
        known = [_by_pages(sysconf if sysconf is not None else getattr(os, "sysconf", None))]
    return max(0, min(known))


def address_space_left(root: Path = _ROOT) -> int | None:
    """Bytes that ``ulimit -v`` (RLIMIT_AS) and ``ulimit -d`` (RLIMIT_DATA) leave this process; None without a limit.

    Files that are mapped count as well, whether or not they are in memory.
    """
    limits, status = _text(root / "proc/self/limits"), status_bytes(_text(root / "proc/self/status"))
    left = []
    for title, field in (("Max address space", "VmSize"), ("Max data size", "VmData")):
        limit = soft_limit(limits, title)
        if limit is not None:
            left.append(max(0, limit - status.get(field, 0)))
    return min(left, default=None)


def meminfo_available(text: str) -> int | None:
    """``MemAvailable`` of /proc/meminfo in bytes."""
    return status_bytes(text).get("MemAvailable")


def status_bytes(text: str) -> dict[str, int]:
    """The entries in kB of /proc/meminfo or /proc/PID/status, in bytes."""
    found = {}
    for line in text.split("\n"):
        name, colon, value = line.partition(":")
        words = value.split()
        if colon and len(words) == 2 and words[1] == "kB" and (number := _number(words[0])) is not None:
            found[name.strip()] = number * 1024
    return found


def soft_limit(text: str, title: str) -> int | None:
    """The soft limit of a line of /proc/PID/limits in bytes, None where it is unlimited."""
    for line in text.split("\n"):
        if line.startswith(title):
            words = line[len(title) :].split()
            return _number(words[0]) if words else None
    return None


def cgroup_paths(text: str) -> dict[int, PurePosixPath]:
    """Of /proc/self/cgroup: hierarchy version -> the process's cgroup in it (of v1, the memory controller's)."""
    found: dict[int, PurePosixPath] = {}
    for line in text.split("\n"):
        number, first, rest = line.partition(":")
        controllers, second, path = rest.partition(":")
        if not (first and second and path.startswith("/")):
            continue
        if number == "0" and not controllers:
            found[2] = PurePosixPath(path)
        elif "memory" in controllers.split(","):
            found[1] = PurePosixPath(path)
    return found


def cgroup_mounts(text: str) -> list[CgroupMount]:
    """The cgroup mounts of /proc/self/mountinfo that may say something about memory."""
    found = []
    for line in text.split("\n"):
        before, dash, after = line.partition(" - ")
        mount, kind = before.split(" "), after.split(" ")
        if not dash or len(mount) < 5 or not (mount[3].startswith("/") and mount[4].startswith("/")):
            continue
        root, place = (PurePosixPath(_unescaped(part)) for part in mount[3:5])
        if kind[0] == "cgroup2":
            found.append(CgroupMount(2, root, place))
        elif kind[0] == "cgroup" and "memory" in kind[-1].split(","):
            found.append(CgroupMount(1, root, place))
    return found


def cgroup_places(mount: CgroupMount, path: PurePosixPath) -> list[PurePosixPath]:
    """The folders of a cgroup and of all above it that the mount shows, the innermost first.

    A cgroup outside of what is mounted (its path goes up, or belongs to the host's tree) leaves the mount's own.
    """
    inside: tuple[str, ...] = ()
    if ".." not in path.parts and path.is_relative_to(mount.root):
        inside = path.relative_to(mount.root).parts
    return [mount.place.joinpath(*inside[:depth]) for depth in range(len(inside), -1, -1)]


def cgroup_left(folder: Path, version: int) -> int | None:
    """Bytes that one cgroup still allows, or None where it sets no limit.

    File cache counts as free, as it does in the machine's ``MemAvailable``: it is given up before memory runs out.
    """
    limit_files, used_file, cache = _CGROUP_FILES[version]
    stat, used = _stat(_text(folder / "memory.stat")), _number(_text(folder / used_file).strip())
    limits = [_number(_text(folder / name).strip()) for name in limit_files]
    set_limits = [limit for limit in limits if limit is not None and limit < _UNLIMITED]
    if not set_limits or used is None:
        return None
    cached = min(used, sum(stat.get(name, 0) for name in cache))
    return max(0, min(set_limits) - used + cached)


def _cgroups_left(root: Path) -> Iterator[int | None]:
    paths = cgroup_paths(_text(root / "proc/self/cgroup"))
    for mount in cgroup_mounts(_text(root / "proc/self/mountinfo")):
        if mount.version not in paths:
            continue
        for depth, place in enumerate(cgroup_places(mount, paths[mount.version])):
            folder = root / place.relative_to("/")
            # Old kernels can leave a v1 cgroup out of what its parent limits.
            if depth and mount.version == 1 and _text(folder / "memory.use_hierarchy").strip() == "0":
                break
            yield cgroup_left(folder, mount.version)


def _by_pages(sysconf: Callable[[str], int] | None) -> int:
    if sysconf is None:
        return UNKNOWN
    for name, fraction in (("SC_AVPHYS_PAGES", 1.0), ("SC_PHYS_PAGES", 0.5)):
        try:
            size = sysconf(name) * sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError):
            continue
        if size > 0:
            return int(size * fraction)
    return UNKNOWN


def _stat(text: str) -> Mapping[str, int]:
    pairs = (line.split() for line in text.split("\n"))
    values = {words[0]: _number(words[1]) for words in pairs if len(words) == 2}
    return {name: value for name, value in values.items() if value is not None}


def _number(text: str) -> int | None:
    # `int` also takes signs, spaces, underscores and digits of other scripts, and refuses very long ones.
    return int(text) if text.isascii() and text.isdigit() and len(text) < 30 else None


def _unescaped(text: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)


def _text(path: Path) -> str:
    try:
        return os.fsdecode(path.read_bytes())
    except (OSError, ValueError):
        return ""
