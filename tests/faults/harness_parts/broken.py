"""Writers with a fault, to see that the harness finds it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from harness_parts.cases import NEW, REPLACED
from harness_parts.checks import Bench, FaultFound, require_ended
from harness_parts.disk_cases import file_size_limit
from harness_parts.moving_cases import interrupted

import patcher.build.local
import patcher.routes.apply
from patcher.checkpoint import staging
from patcher.cli import progress
from patcher.disk import failures as disk


def writes_in_place() -> None:
    """The output is written where it will lie, file by file."""

    @contextlib.contextmanager
    def in_place(output: Path, *, force: bool = False) -> Iterator[Path]:
        output.mkdir(exist_ok=True)
        yield output

    patcher.build.local.staged_folder = in_place  # type: ignore[assignment]


def keeps_leftovers() -> None:
    """Nobody cleans up after a build that was killed."""
    staging.remove_leftovers = lambda _output: []  # type: ignore[assignment]


def touches_the_base() -> None:
    """A file of the base is opened for writing, and closed again."""
    honest = patcher.routes.apply.write_copy

    def touching(base: Any, stage: Path, **options: Any) -> Any:
        (base.path / base.weight_files[0]).touch()
        return honest(base, stage, **options)

    patcher.routes.apply.write_copy = touching


def shows_stack_traces() -> None:
    """A full disk is an exception like any other."""
    staging.disk_errors = contextlib.nullcontext  # type: ignore[assignment]
    disk.disk_errors = contextlib.nullcontext  # type: ignore[assignment]


def ignores_interrupts() -> None:
    """Neither Ctrl-C nor SIGTERM stops it."""
    honest = progress.Voice.__call__

    def says(voice: progress.Voice, text: str) -> None:
        honest(voice, text)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    progress.Voice.__call__ = says  # type: ignore[method-assign]


def killed_while_it_verifies(bench: Bench) -> None:
    bench.reset(NEW)
    build = bench.shop.start(bench.arguments(NEW))
    build.until("verifying: the base")
    with contextlib.suppress(ProcessLookupError):
        os.kill(build.pid, signal.SIGKILL)
    build.wait()
    bench.require_outputs(NEW, ["absent"])
    bench.require_base(NEW)
    require_ended(build)
    bench.require_cleaned_by_the_next()


Check = Callable[[Bench], object]
BROKEN: dict[str, tuple[Callable[[], None], Check]] = {
    "it writes in place": (writes_in_place, killed_while_it_verifies),
    "it keeps leftovers": (keeps_leftovers, killed_while_it_verifies),
    "it touches the base": (touches_the_base, killed_while_it_verifies),
    "it shows stack traces": (shows_stack_traces, partial(file_size_limit, limit=1024, mode=REPLACED)),
    "it ignores interrupts": (
        ignores_interrupts,
        partial(interrupted, number=signal.SIGTERM, words="verifying: the base", mode=NEW),
    ),
}
"""What is planted, and what must find it."""


def found(bench: Bench, name: str) -> str | None:
    """What the harness says of that fault, in a fork of its own that has it; None if it finds nothing."""
    plant, check = BROKEN[name]
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            plant()
            check(bench)
        except FaultFound as error:
            os.write(writer, str(error).encode()[:4000])
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        said = file.read().decode()
    os.waitpid(pid, 0)
    for as_bin, base in bench.bases.items():
        for name_, (_digest, when) in bench.bases_before[as_bin].items():
            os.utime(base / name_, ns=(when, when))
    return said or None
