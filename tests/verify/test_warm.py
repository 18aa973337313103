"""The process that waits for its job: it does it, and it ends with who started it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from patcher.verify import warm
from patcher.verify.watched import WaitingProcess, watched_command


def test_it_is_told_line_by_line(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("print(told()); print(told()); raise SystemExit(3)\n")
    process = WaitingProcess(watched_command(sys.executable, program), os.environ)
    process.tell("one")
    process.tell("two")
    done = process.finish()
    assert done.returncode == 3 and done.stdout == "one\ntwo\n"


def test_it_ends_with_a_build_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "program.py"
    program.write_text("told()\n")
    started: list[WaitingProcess] = []

    def start() -> WaitingProcess:
        started.append(WaitingProcess(watched_command(sys.executable, program), os.environ))
        return started[0]

    monkeypatch.setattr(warm, "start", start)
    monkeypatch.setattr(warm, "cores", lambda: {0, 1})
    with pytest.raises(ValueError, match="of the plan"), warm.warmed_up():
        raise ValueError("of the plan")
    assert started[0]._process.returncode is not None


@pytest.mark.parametrize(("wanted", "cores"), [(False, {0, 1}), (True, {0})])
def test_none_is_started_where_it_is_no_use(monkeypatch: pytest.MonkeyPatch, wanted: bool, cores: set[int]) -> None:
    monkeypatch.setattr(warm, "start", lambda: pytest.fail("it was started"))
    monkeypatch.setattr(warm, "cores", lambda: cores)
    with warm.warmed_up(wanted=wanted) as process:
        assert process is None
