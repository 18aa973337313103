"""What is going on, on stderr: bars on a terminal, one line a stage in a log, nothing with --quiet."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

from patcher.cli.interrupts import obey_interrupts
from patcher.progress.stage import Measure, Stage

if TYPE_CHECKING:
    from patcher.cli.bars import Bars


class Voice:
    """Says what is being done now, a line a stage, and notes what only ``-v`` shows.

    Args:
        bars: where there is a terminal to draw them on.
        quiet: only warnings.
    """

    def __init__(self, console: Console, bars: Bars | None = None, *, verbose: bool = False, quiet: bool = False):
        self._console, self._bars, self._verbose, self._quiet = console, bars, verbose, quiet
        self._said: set[str] = set()

    def __call__(self, text: str) -> None:
        """What is being done now."""
        obey_interrupts()
        if self._quiet:
            return
        if self._bars is not None:
            self._bars.say(text)
        elif text not in self._said:
            # A stage that comes again is no news: its first line stands for all.
            self._said.add(text)
            self._print(text)

    def note(self, text: str) -> None:
        """A line that stays, for those who asked for more."""
        if self._verbose:
            self._print(f"  {text}")

    def warn(self, text: str) -> None:
        """A line that stays, for everyone."""
        obey_interrupts()
        self._print(text)

    @contextmanager
    def stage(self, text: str, total: float | None, unit: str, measure: Measure | None) -> Iterator[Stage]:
        """What is being done in a block, see :func:`patcher.progress.stage.doing`."""
        self(text)
        if self._bars is None or self._quiet:
            yield _Obeying(total)
            return
        with self._bars.stage(text, total, unit, measure) as running:
            yield running

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False)


class _Obeying(Stage):
    def at(self, done: float, total: float | None = None) -> None:
        obey_interrupts()
        super().at(done, total)


@contextmanager
def progress(verbose: bool = False, quiet: bool = False) -> Iterator[Voice]:
    """A voice on stderr."""
    _silence_the_hub()
    console = Console(stderr=True, highlight=False)
    if quiet or not _can_be_drawn_on(console):
        yield Voice(console, verbose=verbose, quiet=quiet)
        return
    from patcher.cli.bars import Bars

    with Bars(console) as bars:
        yield Voice(console, bars, verbose=verbose)


def _can_be_drawn_on(console: Console) -> bool:
    """Whether lines can be drawn over. FORCE_COLOR makes a terminal of a log for rich, and not for this."""
    stderr = sys.stderr
    return stderr is not None and stderr.isatty() and console.is_terminal and not console.is_dumb_terminal


def _silence_the_hub() -> None:
    """No bars of the Hub's client beside these: what it downloads is shown by them."""
    if "huggingface_hub" in sys.modules:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    else:
        # Read when it is imported, which takes too long for commands that do without.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
