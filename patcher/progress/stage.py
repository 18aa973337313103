"""What is being done, how far it is, and who is told: one way to say it for a terminal, a log and a callback."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol

Say = Callable[[str], None]
"""Told a line about what is going on. A :class:`Voice` is one that can do more."""

BYTES = "bytes"


def silent(_text: str) -> None:
    """Says nothing."""


class Stage:
    """How far a stage is. This one tells nobody.

    Attributes:
        total: how much there is to do; None where that is not known.
        done: how much of it is done.
    """

    def __init__(self, total: float | None = None) -> None:
        self.total, self.done = total, 0.0

    def advance(self, count: float = 1) -> None:
        """So much more is done."""
        self.at(self.done + count)

    def at(self, done: float, total: float | None = None) -> None:
        """So much is done, of ``total`` if it is only known now."""
        self.done, self.total = done, self.total if total is None else total


Measure = Callable[[], float]
"""How much of a stage is done, for work that cannot tell; called now and then, from another thread."""


class Voice(Protocol):
    """What a command has: it says lines, and shows stages."""

    def __call__(self, text: str) -> None:
        """What is being done now, until the next thing is said."""
        ...

    def note(self, text: str) -> None:
        """What only the curious want to know."""
        ...

    def warn(self, text: str) -> None:
        """What must be seen, also by those who asked for quiet."""
        ...

    def stage(
        self, text: str, total: float | None, unit: str, measure: Measure | None
    ) -> AbstractContextManager[Stage]:
        """See :func:`doing`."""
        ...


@contextmanager
def doing(
    say: Say, text: str, total: float | None = None, unit: str = "", measure: Measure | None = None
) -> Iterator[Stage]:
    """What is being done during a ``with`` block, and how far it is.

    ::

        with doing(say, "reading activations", total=80, unit="prompts") as reading:
            reading.advance()

    On a terminal that is a bar with the time that it took and will take, in a log one line. A ``say`` that only takes
    lines is told ``text``, once.

    Args:
        total: how much there is to do, where that is known.
        unit: of ``total``: its plural, or :data:`BYTES`.
        measure: says how much is done, instead of the block.
    """
    show = getattr(say, "stage", None)
    if show is None:
        say(text)
        yield Stage(total)
        return
    with show(text, total, unit, measure) as running:
        yield running


def warn(say: Say, text: str) -> None:
    """Say what must be seen, also by those who asked for quiet."""
    getattr(say, "warn", say)(text)


def bytes_in(folder: Path) -> int:
    """The sizes of the files in a folder, also while they grow."""
    total = 0
    for place, _folders, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += (Path(place) / name).lstat().st_size
    return total
