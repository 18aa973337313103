"""The process of a command ends at once, and loses nothing by it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LATE = """
class Late:
    def __del__(self):
        print("taken apart", flush=True)
import sys
from patcher import __main__, cli
sys.late = Late()
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_nothing_is_taken_apart_and_what_was_registered_runs() -> None:
    begin = "import atexit\natexit.register(print, 'first')\n"
    command = "def command():\n    atexit.register(print, 'registered')\n    print('x' * 10**6)\n    sys.exit(3)\n"
    done = run(begin + LATE + command + "cli.main = command\n__main__.main()")
    assert done.returncode == 3
    assert done.stdout == "x" * 10**6 + "\nregistered\n"
    assert not done.stderr


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("raise RuntimeError('broken')", 1, "broken"),
        ("sys.exit('a message')", 1, "a message"),
        ("sys.modules['coverage'] = sys; sys.exit(3)", 3, ""),
        ("sys.settrace(print); sys.exit(3)", 3, ""),
    ],
)
def test_other_ends_are_those_of_python(end: str, status: int, said: str) -> None:
    watched = "import os\nos._exit = lambda _status: print('at once')\n"
    done = run(LATE + watched + f"def command():\n    {end}\ncli.main = command\n__main__.main()")
    assert done.returncode == status
    assert "at once" not in done.stdout
    assert said in done.stderr


@pytest.mark.parametrize(("arguments", "status"), [(["--version"], 0), (["nothing.yaml"], 2), (["chat", "--no"], 2)])
def test_the_status_is_that_of_the_command(arguments: list[str], status: int) -> None:
    done = run(LATE + "__main__.main()", *arguments)
    assert done.returncode == status
    assert "taken apart" not in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full disk to write to")
def test_what_cannot_be_written_is_told() -> None:
    full = "sys.stdout = open('/dev/full', 'w')\ncli.main = lambda: (print('lost'), sys.exit(0))\n"
    done = run(LATE + full + "__main__.main()")
    assert done.returncode == 120
    assert "No space left" in done.stderr
