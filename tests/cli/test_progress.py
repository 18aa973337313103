"""Progress: bars on a terminal, one line a stage without counts in a log, and nothing with --quiet."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.hub_server import HubServer

from patcher.cli.progress import progress
from patcher.progress.stage import doing, warn

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys, time
from patcher.cli.progress import progress
from patcher.progress.stage import BYTES, doing, warn

began = time.perf_counter()
with progress(quiet="-q" in sys.argv) as say:
    say("reading the config")
    with doing(say, "reading activations", 40, "prompts") as reading:
        for _ in range(40):
            reading.advance()
            time.sleep(0.02)
    warn(say, "note: look here")
    with doing(say, "verifying"):
        say("the base"), time.sleep(0.3)
        say("the copy")
    with doing(say, "writing", 8e8, BYTES, lambda: 1e9 * (time.perf_counter() - began)):
        time.sleep(0.5)
print("result")
"""


def on_a_terminal(*arguments: str, program: str = PROGRAM, **variables: str) -> str:
    """What a person sees of the program, with all that moves the cursor."""
    master, slave = pty.openpty()
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**kept, "TERM": "xterm", "PYTHONPATH": str(ROOT), "COLUMNS": "100", **variables},
    )
    os.close(slave)
    seen, limit = b"", time.monotonic() + 60
    while time.monotonic() < limit:
        if select.select([master], [], [], 0.1)[0]:
            try:
                seen += os.read(master, 65536)
            except OSError:
                break
        elif process.poll() is not None:
            break
    os.close(master)
    assert process.wait() == 0, seen
    return seen.decode()


def in_a_log(**variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
    )


TERMINALS: list[dict[str, str]] = [{}, {"NO_COLOR": "1"}, {"PYTHONIOENCODING": "cp1252"}, {"COLUMNS": "30"}]
LOGS: list[dict[str, str]] = [{}, {"FORCE_COLOR": "1"}, {"TERM": "xterm"}]


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, Future[Any]]]:
    """The program, which waits more than it computes, in all the ways in which it is looked at: at once."""
    ways: dict[str, Callable[[], Any]] = {
        "quiet": partial(on_a_terminal, "-q"),
        "dumb": partial(on_a_terminal, TERM="dumb"),
        **{f"terminal {variables}": partial(on_a_terminal, **variables) for variables in TERMINALS},
        **{f"log {variables}": partial(in_a_log, **variables) for variables in LOGS},
    }
    with ThreadPoolExecutor(5) as pool:
        yield {name: pool.submit(way) for name, way in ways.items()}


def lines(seen: str) -> list[str]:
    """What stays on the screen: each line as it was drawn last."""
    plain = [re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", line.rpartition("\x1b[2K")[2]) for line in seen.split("\r\n")]
    return [line.strip("\r") for line in plain if line.strip()]


def test_bars_on_a_terminal(runs: dict[str, Future[Any]]) -> None:
    seen = runs["terminal {}"].result()
    assert re.search(r"reading activations.*?\d+/40 prompts  0:00, 0:0\d left", seen), seen
    assert re.search(r"writing.*? MB of 800.0 MB", seen)
    assert "━" in seen and seen.count("\x1b[?25h") == 1, "the cursor comes back"
    stays = [line for line in lines(seen) if "━" not in line and not re.search(r" 0:0\d$", line)]
    expected = [
        r"  reading the config",
        r"  reading activations: [01]\.\d s",
        r"note: look here",
        r"    the base",
        r"    the copy",
        r"  verifying: 0\.\d s",
        r"  writing: 0\.\d s",
        r"result",
    ]
    assert len(stays) == len(expected) and all(map(re.fullmatch, expected, stays)), stays


@pytest.mark.parametrize("variables", TERMINALS[1:])
def test_other_terminals(variables: dict[str, str], runs: dict[str, Future[Any]]) -> None:
    seen = runs[f"terminal {variables}"].result()
    assert "Traceback" not in seen and lines(seen)[-1] == "result"
    if "NO_COLOR" in variables:
        assert not re.search(r"\x1b\[[\d;]*3\dm", seen)
    if "PYTHONIOENCODING" in variables:
        assert "━" not in seen and "left" in seen


LOG = ["reading the config", "reading activations", "note: look here", "verifying", "the base", "the copy", "writing"]


def test_a_terminal_that_cannot_be_drawn_on_is_a_log(runs: dict[str, Future[Any]]) -> None:
    assert runs["dumb"].result().split("\r\n") == [*LOG, "result", ""]


@pytest.mark.parametrize("variables", LOGS)
def test_a_log(variables: dict[str, str], runs: dict[str, Future[Any]]) -> None:
    done = runs[f"log {variables}"].result()
    assert done.stderr.splitlines() == LOG and done.stdout == "result\n"


def test_quiet_on_a_terminal(runs: dict[str, Future[Any]]) -> None:
    assert runs["quiet"].result() == "note: look here\r\nresult\r\n"


def test_a_stage_that_comes_again_has_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as say:
        for done in range(3):
            with doing(say, "sweeping", 9, "cells") as sweeping:
                sweeping.at(done)
            warn(say, "again")
    assert capsys.readouterr().err == "sweeping\nagain\nagain\nagain\n"


def test_without_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    with progress() as say, doing(say, "reading", 3) as reading:
        reading.advance()


DOWNLOAD = """
import sys
from patcher.cli.progress import progress
from patcher.checkpoint.source import download

with progress(quiet="-q" in sys.argv) as say:
    say("asking the Hub")
    folder = download("org/base", None, ["*"], say=say)
    say(f"it has {(folder / 'model.safetensors').stat().st_size} bytes")
"""


@pytest.mark.slow
def test_a_download_has_one_bar_and_it_is_not_the_hubs(tmp_path: Path) -> None:
    with HubServer() as hub:
        hub.add_repo("org/base", {"config.json": b"{}", "model.safetensors": bytes(160_000_000)})
        variables = hub.environment(str(tmp_path / "home"))
        del variables["HF_HUB_DISABLE_PROGRESS_BARS"]
        quiet = on_a_terminal("-q", program=DOWNLOAD, **{**variables, "HF_HOME": str(tmp_path / "other")})
        seen = on_a_terminal(program=DOWNLOAD, **variables)
    assert quiet == ""
    assert re.search(r"downloading org/base.* of 160\.0 MB", seen), seen
    assert "%|" not in seen and "Fetching" not in seen and "Downloading bytes" not in seen
    stays = [line for line in lines(seen) if "━" not in line and not re.search(r" 0:0\d$", line)]
    assert stays[-1] == "  it has 160000000 bytes" and re.fullmatch(r"  downloading org/base: \d+\.\d s", stays[-2])
