"""The command line in this process: what was asked of it, how it ended, and what it printed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from patcher.cli import main

Run = Callable[..., tuple[int, str, str]]
"""Arguments -> the exit code, stdout and stderr."""


def runner(capsys: pytest.CaptureFixture[str], *before: str, after: tuple[str, ...] = ()) -> Run:
    """Runs ``patch-model``; ``before`` and ``after`` stand around the arguments of every call."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            main([*before, *map(str, arguments), *after])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return int(done.value.code or 0), captured.out, captured.err

    return call
