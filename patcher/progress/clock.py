"""Seconds by stage: where the time of a build or a sweep goes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

Opened = TypeVar("Opened")

TOTAL, OTHER, START = "total", "other", "start"


class Clock:
    """Takes the time of stages. Each second belongs to one stage, so that their sum is the total.

    A stage inside another one takes its time from it: what ``load`` takes inside ``capture`` is no part of ``capture``.
    A name with a dot is a part: ``evaluate.effect`` of ``evaluate``. Other threads than the one that made the clock run
    beside it, and claim nothing.

    Args:
        began: when the first stage, ``start``, began, by ``now``; it ends when the clock is made. By default there is
            none: the clock runs from when it is made.
        now: reads the time, in seconds.
    """

    def __init__(self, began: float | None = None, now: Callable[[], float] = time.perf_counter) -> None:
        self._now, self._since = now, now()
        self._running: list[str] = []
        self._thread = threading.get_ident()
        self._seconds: dict[str, float] = {} if began is None else {START: max(0.0, self._since - began)}

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Give ``stage`` the time of a ``with`` block, but for what stages inside it claim."""
        if threading.get_ident() != self._thread:
            yield
            return
        self._claim()
        self._running.append(stage)
        try:
            yield
        finally:
            self._claim()
            self._running.pop()

    def give(self, stage: str, seconds: float) -> None:
        """Give ``stage`` some of the time of the stage that runs: what another process measured, and this one awaited.

        Never more than the running stage has taken.
        """
        if threading.get_ident() != self._thread:
            return
        self._claim()
        running = self._running[-1] if self._running else ""
        given = max(0.0, min(seconds, self._seconds[running]))
        self._seconds[running] -= given
        self._seconds[stage] = self._seconds.get(stage, 0.0) + given

    @contextmanager
    def opening(self, stage: str, context: AbstractContextManager[Opened]) -> Iterator[Opened]:
        """``context``, of which ``stage`` gets the time until it is entered."""
        with ExitStack() as stack:
            with self.time(stage):
                opened = stack.enter_context(context)
            yield opened

    def timings(self, stages: Sequence[str] = ()) -> dict[str, float]:
        """Seconds by stage, its parts in it; ``other`` is what none claims; last the ``total`` until now, their sum.

        Args:
            stages: those that are there also when they took no time, in this order. Others come after them.
        """
        whole = dict.fromkeys(stages, 0.0)
        for name, seconds in self._read().items():
            stage = name.partition(".")[0]
            whole[stage] = whole.get(stage, 0.0) + seconds
        other = whole.pop("", 0.0)
        rounded = {stage: round(seconds, 4) for stage, seconds in {**whole, OTHER: other}.items()}
        return {**rounded, TOTAL: round(sum(rounded.values()), 4)}

    def parts(self) -> dict[str, dict[str, float]]:
        """Stage -> part -> seconds, of the stages that have parts; what is in none of them is their ``other``."""
        found: dict[str, dict[str, float]] = {}
        seconds = self._read()
        for name, value in seconds.items():
            stage, dot, part = name.partition(".")
            if dot:
                found.setdefault(stage, {})[part] = round(value, 4)
        for stage, parts in found.items():
            if stage in seconds:
                parts[OTHER] = round(parts.get(OTHER, 0.0) + seconds[stage], 4)
        return found

    def _claim(self) -> None:
        """Give the running stage, or none (the empty name), the time since the last claim."""
        now = self._now()
        name = self._running[-1] if self._running else ""
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now

    def _read(self) -> dict[str, float]:
        if threading.get_ident() == self._thread:
            self._claim()
        return dict(self._seconds)


def process_began() -> float:
    """When this process was started, by ``time.perf_counter``; on systems without /proc: now, after its imports."""
    now = time.perf_counter()
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return now
    return now - age if age >= 0 else now
