"""A job: a recipe that is run, where to, and how whoever runs it is told what is going on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from patcher.recipe.file import LoadedRecipe
from patcher.recipe.schema import Recipe

if TYPE_CHECKING:
    from patcher.capture.processes.messages import Processes

Say = Callable[[str], None]


def silent(_text: str) -> None:
    """Says nothing."""


@dataclass
class Clock:
    """Seconds by stage, from when it was made."""

    timings: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings[stage] = self.timings.get(stage, 0.0) + time.perf_counter() - start

    def read(self, stages: Sequence[str]) -> dict[str, float]:
        """The seconds of some stages, 0 for one that did not occur, and the ``total`` until now."""
        seconds = {stage: self.timings.get(stage, 0.0) for stage in stages}
        return {
            stage: round(value, 4) for stage, value in {**seconds, "total": time.perf_counter() - self.began}.items()
        }


@dataclass(frozen=True)
class Job:
    """What a build, a remote build, a sweep and a chat need besides what they are asked to do.

    Attributes:
        loaded: the recipe and its file.
        output: the folder that is made. Scratch folders lie beside it.
        say: called with a line about what is going on.
        note: called with what only the curious want to know (``-v``).
        force: replace what an earlier run left in the output.
        cache: whether activations that were captured before, of the same model and prompts, are taken again.
        token: of the Hub account that publishes; by default the one that is logged in.
        processes: of a launch of several (this is process 0): all read activations, and this one does the rest.
        clock: takes the time; it runs from when the job is made.
    """

    loaded: LoadedRecipe
    output: Path
    say: Say = print
    note: Say = silent
    force: bool = False
    cache: bool = True
    token: str | None = None
    processes: Processes | None = None
    clock: Clock = field(default_factory=Clock)

    @property
    def recipe(self) -> Recipe:
        """The keys of the recipe."""
        return self.loaded.recipe
