"""What is going on, on stderr: one living line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.status import Status

from patcher.cli.interrupts import obey_interrupts


class Voice:
    """Says what is being done now, and notes what only ``-v`` shows."""

    def __init__(self, console: Console, status: Status | None, verbose: bool) -> None:
        self._console, self._status, self._verbose = console, status, verbose
        self._said: set[str] = set()

    def __call__(self, text: str) -> None:
        """What is being done now."""
        obey_interrupts()
        if self._status is not None:
            self._status.update(text)
            return
        # Counters ("32 of 240 prompts") would fill a log; their first line stands for all.
        kind = re.sub(r"\d+ of \d+", "", text)
        if kind not in self._said:
            self._said.add(kind)
            self._console.print(text, soft_wrap=True, markup=False)

    def note(self, text: str) -> None:
        """A line that stays, for those who asked for more."""
        if self._verbose:
            self._console.print(f"  {text}", soft_wrap=True, markup=False)


@contextmanager
def progress(verbose: bool = False) -> Iterator[Voice]:
    """A voice on stderr."""
    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        with console.status("starting") as status:
            yield Voice(console, status, verbose)
        return
    yield Voice(console, None, verbose)
