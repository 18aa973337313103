"""Processes that end with this one, however it ends."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
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


class WaitingProcess:
    """A :func:`watched_command` that is started before its work is known, and told it line by line."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.command = list(command)
        # Nobody reads while it waits, so what it says must not fill a pipe.
        self._said = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115 - closed with it
        stdout, stderr = self._said
        self._process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=stdout, stderr=stderr, env=dict(environment)
        )

    def tell(self, line: str) -> None:
        """Hand it a line; one that has died hears nothing."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()

    def finish(self) -> subprocess.CompletedProcess[str]:
        """Wait for its end; what it wrote to stdout and stderr is text of the result."""
        code = self._process.wait()
        texts = []
        for file in self._said:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        self.close()
        return subprocess.CompletedProcess(self.command, code, *texts)

    def close(self) -> None:
        """End it, whatever it does."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        for file in self._said:
            file.close()
