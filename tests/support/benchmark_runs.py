"""Benchmarks run as programs, in a folder that they may fill."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_benchmark(program: Path, folder: Path, *arguments: object) -> None:
    """Its record is then ``folder / "record.json"``, its page ``folder / "page.md"``."""
    command = [sys.executable, program, *arguments, "--json", folder / "record.json", "--write", folder / "page.md"]
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
