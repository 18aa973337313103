"""Answers as they are written: two columns on a wide terminal, one after the other elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

WIDE = 80
"""Columns of a terminal on which two answers stand side by side."""
_UNFINISHED = "�"
_CONTROLS = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "")


def printable(text: str) -> str:
    """Text of a model without what a terminal obeys."""
    return text.translate(_CONTROLS)


class Lines:
    """One answer after the other, as plain text; the first is written as it comes, the next when that is finished.

    Args:
        file: where to.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._labels: list[str] = []
        self._place = -1
        self._written = ""

    def begin(self, labels: Sequence[str]) -> None:
        """A new answer of every side."""
        self._labels, self._place = list(labels), -1
        self._next()

    def show(self, texts: Sequence[str], finished: int) -> None:
        """What is written so far; ``finished`` sides are complete."""
        self._finish(texts, finished)
        self._add(texts[self._place], final=False)

    def end(self, texts: Sequence[str]) -> None:
        """Everything is written."""
        self._finish(texts, len(texts))
        self._write("\n")

    def _finish(self, texts: Sequence[str], finished: int) -> None:
        while self._place < finished:
            self._add(texts[self._place], final=True)
            self._next()

    def _next(self) -> None:
        if self._place >= 0:
            self._write("\n")
        self._place += 1
        self._written = ""
        if self._place < len(self._labels):
            self._write(f"{self._labels[self._place]}: ")

    def _add(self, text: str, *, final: bool) -> None:
        # A character of several tokens is not one until its last is there.
        text = printable(text).lstrip()
        text = text if final else text.rstrip(_UNFINISHED)
        if text.startswith(self._written):
            self._write(text[len(self._written) :])
            self._written = text
        elif final:
            self._write(f"\n{text}")

    def _write(self, text: str) -> None:
        if text:
            self._file.write(text)
            self._file.flush()


class Columns:
    """All answers at once, side by side; while they are written, the last lines that fit on the screen."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._labels: list[str] = []
        self._live: Live | None = None

    def begin(self, labels: Sequence[str]) -> None:
        """A new answer of every side."""
        self._labels = list(labels)
        self._live = Live(console=self._console, transient=True, auto_refresh=False, vertical_overflow="crop")
        self._live.start()

    def show(self, texts: Sequence[str], finished: int) -> None:
        """What is written so far."""
        assert self._live is not None
        self._live.update(self._table(texts, self._console.height - 6), refresh=True)

    def end(self, texts: Sequence[str]) -> None:
        """Everything is written."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._console.print(self._table(texts, None))
        self._console.print()

    def _table(self, texts: Sequence[str], lines: int | None) -> RenderableType:
        table = Table(box=None, expand=True, padding=(0, 2, 0, 0), show_edge=False)
        width = self._console.width // len(texts) - 2
        cells = []
        for label, text in zip(self._labels, texts, strict=True):
            table.add_column(Text(label), ratio=1, overflow="fold", header_style="bold", max_width=width)
            wrapped = Text(printable(text).strip()).wrap(self._console, width)
            shown = list(wrapped) if lines is None else list(wrapped)[-max(lines, 1) :]
            cells.append(Text("\n").join(shown))
        table.add_row(*cells)
        return table


def display(console: Console, sides: int) -> Lines | Columns:
    """The display that fits where the console prints."""
    if sides > 1 and console.is_terminal and not console.is_dumb_terminal and console.width >= WIDE:
        return Columns(console)
    return Lines(console.file)
