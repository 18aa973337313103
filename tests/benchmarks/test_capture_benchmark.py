"""The benchmark runs, and its contenders make the same vector. Nothing is said about time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.benchmark_runs import run_benchmark

BENCHMARKS = Path(__file__).parent
OURS, CAA = "patch-model", "the way of nrimsky/CAA"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What a tiny run wrote, without the other libraries."""
    folder = tmp_path_factory.mktemp("benchmark")
    options = ("--tiny", "--dtypes", "fp32", "--repeats", 1, "--tables", "contenders,floor,layers")
    run_benchmark(BENCHMARKS / "capture.py", folder, *options, "--peers", folder / "none")
    return folder


@pytest.mark.slow
def test_vectors_agree(folder):
    record = json.loads((folder / "record.json").read_text())["fp32"]
    assert record["cosines"][OURS] == pytest.approx(1)
    assert record["cosines"][CAA] > 0.9999
    # Other words under the same letters: a vector of the wrong prompts would not pass.
    assert record["control"] < 0.999


@pytest.mark.slow
def test_the_arithmetic_is_counted(folder):
    work = json.loads((folder / "record.json").read_text())["fp32"]["floor"]["work"]
    # The sides of a pair share all but the letter and what closes it; the four questions share their "Q:".
    assert work["distinct"] == work["whole"] // 2 + 4 * 2 - 3 * 2
    # Blocks 0 and 1 of a Qwen2 with hidden 128, MLP 256 and half as many key heads.
    weights = 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256)
    assert work["linear"] == 2 * work["distinct"] * weights


@pytest.mark.slow
def test_the_page_says_what_was_not_run(folder):
    page = (folder / "page.md").read_text()
    assert page.startswith("# Performance")
    rows = [line for line in page.splitlines() if line.startswith("| repeng")]
    assert len(rows) == 1 and "not run" in rows[0]
    assert str(folder) not in page.replace(str(folder / "page.md"), "")


@pytest.mark.slow
def test_a_contender_cannot_import_what_is_not_its_own(tmp_path):
    (tmp_path / "cheat.py").write_text("import patcher\n")
    serve = BENCHMARKS / "capture_workers" / "serve.py"
    run = subprocess.run(
        [sys.executable, "-I", serve, tmp_path / "cheat.py", tmp_path, "float32", "--forbid", "patcher"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode != 0 and "patcher" in run.stderr.splitlines()[-1]
