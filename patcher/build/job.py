"""A job: a recipe that is run, where to, and how whoever runs it is told what is going on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from patcher.progress.clock import Clock
from patcher.progress.stage import Measure, Say, Stage, doing, silent
from patcher.recipe.file import LoadedRecipe
from patcher.recipe.schema import Recipe

if TYPE_CHECKING:
    from patcher.capture.processes.messages import Processes


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
        clock: takes the time of the stages; by default it runs from when the job is made.
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

    @contextmanager
    def stage(
        self, name: str, text: str, total: float | None = None, unit: str = "", measure: Measure | None = None
    ) -> Iterator[Stage]:
        """Do something that is timed as ``name`` (see :class:`Clock`) and told as ``text`` (see :func:`doing`)."""
        with self.clock.time(name), doing(self.say, text, total, unit, measure) as stage:
            yield stage
