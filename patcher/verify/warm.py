"""The process that verifies, started while a build still plans: its imports are done when its job is known."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from patcher.verify.watched import WaitingProcess, watched_command

RUNNER = Path(__file__).with_name("programs") / "stock_run.py"
MANY_TIMES = 5
"""The base is loaded early only where so many of it in fp32 fit in memory: a build needs some itself."""


@contextlib.contextmanager
def warmed_up(*, wanted: bool = True) -> Iterator[WaitingProcess | None]:
    """A process that imports what a verification needs, and ends when this context does; None where it is no use.

    Args:
        wanted: whether a verification will follow.
    """
    process = start() if wanted and len(cores()) > 1 else None
    try:
        yield process
    finally:
        if process is not None:
            process.close()


def start() -> WaitingProcess:
    """Start the program without a job."""
    return WaitingProcess([*watched_command(sys.executable, RUNNER), "--wait"], os.environ)


def cores() -> set[int]:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def prepare(process: WaitingProcess | None, folder: Path, *, device: str = "cpu") -> None:
    """Let it import the class of the base, and load the base where memory is plentiful; nothing is run."""
    if process is None:
        return
    from patcher.capture.memory import available_memory
    from patcher.checkpoint.folder import CheckpointFolder
    from patcher.checkpoint.sizes import fp32_bytes

    checkpoint = CheckpointFolder(folder)
    plain = not checkpoint.is_bin and not {"quantization_config", "auto_map"} & checkpoint.config.keys()
    load = plain and device == "cpu" and MANY_TIMES * fp32_bytes(checkpoint) <= available_memory()
    process.tell(json.dumps({"prepare": str(folder), "load": load}))
