"""A command, and what it and all processes that it starts cost together."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

EVERY = 0.1
"""Seconds between two looks at the memory: a look takes some milliseconds."""
TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cost:
    """What a command cost.

    Attributes:
        wall: seconds from its start to its end.
        cpu: user and system seconds, of all its processes.
        largest: the most bytes that one of its processes had resident.
        together: the most that all of them had at the same time; a page that two of them map counts twice.
        processes: how many there were.
        output: its stdout.
    """

    wall: float
    cpu: float
    largest: int
    together: int
    processes: int
    output: str


def run(command: Sequence[str | Path], *, variables: Mapping[str, str], folder: Path) -> Cost:
    """Run it in ``folder``.

    Raises:
        RuntimeError: it failed.
    """
    before = os.times()
    start = time.perf_counter()
    with (folder / "stderr").open("wb") as errors:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=folder,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    seen = _Tree(process.pid)
    with seen:
        output, _ = process.communicate()
    wall = time.perf_counter() - start
    after = os.times()
    if process.returncode:
        said = (folder / "stderr").read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {process.returncode}\n{said[-4000:]}")
    waited = after.children_user + after.children_system - before.children_user - before.children_system
    # A process that nobody waited for is in the second sum only.
    cpu = max(waited, sum(seen.cpu.values()))
    return Cost(wall, cpu, max(seen.peaks.values(), default=0), seen.together, len(seen.peaks), output)


class _Tree:
    """Looks at a process and those below it until it is left."""

    def __init__(self, root: int) -> None:
        self.peaks: dict[int, int] = {}
        self.cpu: dict[int, float] = {}
        self.together = 0
        self._root = root
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(EVERY):
            resident = 0
            for pid, times in _below(self._root).items():
                # It may end while it is looked at.
                with contextlib.suppress(OSError, KeyError):
                    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
                    sizes = {line.split(":")[0]: line.split() for line in status if line.startswith(("VmHWM", "VmRSS"))}
                    resident += int(sizes["VmRSS"][1]) * 1024
                    self.peaks[pid] = int(sizes["VmHWM"][1]) * 1024
                    self.cpu[pid] = times
            self.together = max(self.together, resident)


def _below(root: int) -> dict[int, float]:
    """The process and all below it: the CPU seconds of each."""
    children: dict[int, list[int]] = {}
    times: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # Behind the name, which may hold anything: state, parent, ...
                fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry.name))
                times[int(entry.name)] = (int(fields[11]) + int(fields[12])) / TICK
    found, left = {}, [root]
    while left:
        pid = left.pop()
        if pid in times:
            found[pid] = times[pid]
        left += children.get(pid, [])
    return found
