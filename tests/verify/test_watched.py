"""The processes of a verification end with the build that started them, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from patcher.verify.watched import run_watched, watched_command

ROOT = Path(__file__).parents[2]
PARENT = """
import os, sys
from pathlib import Path
from patcher.verify.watched import run_watched, watched_command
run_watched([*watched_command(sys.executable, Path(sys.argv[1])), sys.argv[2]], os.environ)
"""
UNWINDS = """
import os, subprocess, sys, time
from pathlib import Path
place = Path(sys.argv[1])
server = subprocess.Popen(["sleep", "300"])
(place / "server.partial").write_text(str(server.pid))
(place / "server.partial").rename(place / "server")
(place / "pid.partial").write_text(str(os.getpid()))
(place / "pid.partial").rename(place / "pid")
try:
    time.sleep(300)
finally:
    server.kill()
    server.wait()
    (place / "unwound").touch()
"""
DEAF = """
import os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, signal.SIG_IGN)
place = Path(sys.argv[1])
(place / "pid.partial").write_text(str(os.getpid()))
(place / "pid.partial").rename(place / "pid")
time.sleep(300)
"""


def until(condition: object, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.02)
    return False


def runs(pid: int) -> bool:
    """A dead process that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow_but("unwinds")
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="what runs is read from /proc")
@pytest.mark.parametrize("text", [UNWINDS, DEAF], ids=["unwinds", "deaf"])
def test_it_ends_with_a_killed_parent(tmp_path: Path, text: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(text)
    command = [sys.executable, "-c", PARENT, str(program), str(tmp_path)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}) as parent:
        assert until((tmp_path / "pid").exists)
        child = int((tmp_path / "pid").read_text())
        assert runs(child)
        parent.send_signal(signal.SIGKILL)
    try:
        assert until(lambda: not runs(child)), "the child goes on"
    finally:
        if runs(child):
            os.kill(child, signal.SIGKILL)
    if text is UNWINDS:
        assert (tmp_path / "unwound").exists()
        assert not runs(int((tmp_path / "server").read_text()))


def test_what_a_program_says_and_returns(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "assert __name__ == '__main__'\n"
        "print(sys.argv[1:], sys.flags.isolated, os.getcwd(), os.environ['OF_TEST'])\n"
        "sys.stderr.buffer.write(b'\\xff said')\n"
        "sys.exit(7)\n"
    )
    command = [*watched_command(sys.executable, program), "one", "two"]
    done = run_watched(command, {**os.environ, "OF_TEST": "kept"}, tmp_path)
    assert done.returncode == 7
    assert done.stdout == f"['one', 'two'] 1 {tmp_path} kept\n"
    assert "said" in done.stderr


@pytest.mark.slow
def test_a_failure_is_told_as_before(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("raise OSError(28, 'No space left on device')\n")
    done = run_watched(watched_command(sys.executable, program), os.environ)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "OSError: [Errno 28] No space left on device"
