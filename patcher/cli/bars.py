"""Progress on a terminal: a line for each stage that runs, which stays, with its seconds, when it has ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

from patcher.cli.interrupts import obey_interrupts
from patcher.progress.stage import BYTES, Measure, Stage

_PER_SECOND = 5
"""How often lines are drawn: seldom, because that takes time from the work."""


class Bars:
    """The lines of stages that run, below those of stages that have ended.

    What is only said holds until the next thing is said, and is a stage without a bar.
    """

    def __init__(self, console: Console) -> None:
        self._progress = _Progress(
            # A spinner of plain characters: not every terminal has others.
            SpinnerColumn("line"),
            TextColumn("{task.description}", markup=False),
            _Bar(bar_width=24),
            _HowFar(),
            console=console,
            transient=True,
            refresh_per_second=_PER_SECOND,
        )
        self._said: list[_Line | None] = [None]
        """What was said last, in each of the stages that run."""

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._end(self._said[-1])
        self._progress.stop()

    def say(self, text: str) -> None:
        """What is done from now on, until something else is said or the stage around it ends."""
        last = self._said[-1]
        if last is not None and last.text == text:
            return
        self._end(last)
        self._said[-1] = self._begin(text, None, "", None)

    @contextmanager
    def stage(self, text: str, total: float | None, unit: str, measure: Measure | None) -> Iterator[Stage]:
        """A line with a bar where there is a ``total``; it is the line that was said with the same words, if any."""
        if (said := self._said[-1]) is not None:
            self._progress.remove_task(said.task)
            self._said[-1] = None
            if said.text != text:
                self._print(said.text)
        line = self._begin(text, total, unit, measure)
        self._said.append(None)
        try:
            yield _Shown(self._progress, line.task, total)
        finally:
            self._end(self._said[-1])
            self._said.pop()
            self._end(line, told=True)

    def _begin(self, text: str, total: float | None, unit: str, measure: Measure | None) -> _Line:
        task = self._progress.add_task(text, total=total, unit=unit, measure=measure)
        return _Line(text, task)

    def _end(self, line: _Line | None, *, told: bool = False) -> None:
        if line is not None:
            self._progress.remove_task(line.task)
            self._print(line.text, time.perf_counter() - line.began if told else None)

    def _print(self, text: str, seconds: float | None = None) -> None:
        took = "" if seconds is None else f": {seconds:.1f} s"
        line = Text("  " * len(self._said) + text + took, style="dim")
        self._progress.console.print(line, soft_wrap=True)


class _Line:
    def __init__(self, text: str, task: TaskID) -> None:
        self.text, self.task, self.began = text, task, time.perf_counter()


class _Shown(Stage):
    """A stage with a line on the terminal."""

    def __init__(self, progress: Progress, task: TaskID, total: float | None) -> None:
        super().__init__(total)
        self._progress, self._task = progress, task

    def at(self, done: float, total: float | None = None) -> None:
        if threading.current_thread() is threading.main_thread():
            obey_interrupts()
        super().at(done, total)
        self._progress.update(self._task, completed=done, total=self.total)


class _Progress(Progress):
    """One that asks those stages how far they are that cannot tell by themselves."""

    def get_renderables(self) -> Any:
        for task in self.tasks:
            measure: Measure | None = task.fields["measure"]
            if measure is not None:
                with suppress(OSError, ValueError):
                    self.update(task.id, completed=min(measure(), task.total or 0))
        return super().get_renderables()


class _Bar(BarColumn):
    def render(self, task: Task) -> Any:
        return Text() if task.total is None else super().render(task)


class _HowFar(ProgressColumn):
    """``32/80 prompts  0:04, 0:06 left``; of a stage without a total only how long it runs."""

    def render(self, task: Task) -> RenderableType:
        unit = str(task.fields["unit"])
        words = []
        if task.total is not None:
            done, total = (decimal(int(n)) if unit == BYTES else f"{n:,.0f}" for n in (task.completed, task.total))
            words.append(f"{done} of {total}" if unit == BYTES else f"{done}/{total} {unit}".rstrip())
        words.append(_clock(task.elapsed or 0))
        if task.total is not None and task.time_remaining is not None and not task.finished:
            words[-1] += f", {_clock(task.time_remaining)} left"
        return Text("  ".join(words), no_wrap=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
