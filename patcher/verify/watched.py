"""Processes that end with this one, however it ends."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

_WATCHED_RUN = Path(__file__).with_name("programs") / "watched_run.py"


def watched_command(python: str | Path, program: Path) -> list[str]:
    """What starts ``program`` in an isolated Python that ends if this process is killed; its arguments follow."""
    return [str(python), "-I", "-B", str(_WATCHED_RUN), str(program)]


def run_watched(
    command: Sequence[str], environment: Mapping[str, str], cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a :func:`watched_command` to its end; what it wrote to stdout and stderr is text of the result."""
    reader, writer = os.pipe()
    try:
        return subprocess.run(
            command,
            stdin=reader,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env=dict(environment),
            cwd=cwd,
        )
    finally:
        # While the other end is open the process knows that this one lives.
        os.close(writer)
        os.close(reader)
