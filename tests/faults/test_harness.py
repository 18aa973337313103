"""A short run of the fault harness, and the faults that it must find itself. (All of it: tests/faults/harness.py.)"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HARNESS = Path(__file__).with_name("harness.py")
KILLS = 6


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """Not in pytest's own temporary folder, which no other user may enter."""
    command = [sys.executable, str(HARNESS), "--kills", str(KILLS), "--seed", "1", "--quick", "--self-test", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (1 if found["failed"] else 0)
    return found


@pytest.mark.slow
def test_every_kill_is_survived(report: dict[str, Any]) -> None:
    kills = report["kills"]
    assert kills["failures"] == []
    assert kills["made"] == kills["survived"] == KILLS


@pytest.mark.slow
def test_every_other_fault_is_handled(report: dict[str, Any]) -> None:
    assert {case["name"]: case["detail"] for case in report["cases"] if case["status"] == "failed"} == {}
    assert sum(case["status"] == "passed" for case in report["cases"]) >= 5
    names = " ".join(case["name"] for case in report["cases"])
    for fault in ("file size", "room for", "read-only", "unreadable", "removed", "overwritten", "two builds", "SIG"):
        assert fault in names


@pytest.mark.slow
def test_planted_faults_are_found(report: dict[str, Any]) -> None:
    assert report["planted"]["overlooked"] == []
    assert len(report["planted"]["found"]) == 5
