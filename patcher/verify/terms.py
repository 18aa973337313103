"""On what terms a folder is verified."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from patcher.progress.clock import Clock
from patcher.progress.stage import Say, silent
from patcher.recipe.schema import VerifySpec
from patcher.verify.watched import WaitingProcess


@dataclass(frozen=True)
class VerifyTerms:
    """What every stack's verification goes by.

    Attributes:
        spec: tolerance, probes and limits, as a recipe states them.
        trust_remote_code: whether code that comes with the base may run.
        scratch: where intermediate files may lie; a build gives a place that the next one cleans if this one dies.
        say: called with a line about what is going on.
        device: what models are run on, as a recipe states it: unless it is ``cpu``, a GPU on which they fit.
        warm: a process that waits for the job, see :mod:`patcher.verify.warm`.
        clock: is told what the base and the copy took.
    """

    spec: VerifySpec = field(default_factory=VerifySpec)
    trust_remote_code: bool = False
    scratch: Path | None = None
    say: Say = silent
    device: str = "auto"
    warm: WaitingProcess | None = None
    clock: Clock = field(default_factory=Clock)
