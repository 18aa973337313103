"""The benchmark of writing runs, and what it counts is right. Nothing is said about time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.benchmark_runs import run_benchmark

BENCHMARK = Path(__file__).with_name("write.py")
MB = 10**6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run with one small checkpoint (40 MB) wrote."""
    folder = tmp_path_factory.mktemp("benchmark")
    run_benchmark(BENCHMARK, folder, "--gigabytes", 0.02, "--repeats", 1, "--quick")
    assert sorted(item.name for item in folder.iterdir()) == ["page.md", "record.json"], "something is left"
    return folder


@pytest.fixture
def measured(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "record.json").read_text())["sizes"]["0.02"]
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_bytes_and_memory(measured: dict[str, Any]) -> None:
    size, runs = measured["size"], measured["runs"]
    assert size > 30 * MB
    for name in ("cp -r", "patch-model"):
        assert size * 0.99 < runs[name][0]["written"] < size * 1.1
    assert 0 < runs["patch-model --link"][0]["written"] < MB
    torch_alone = runs["import"][0]["peak"]
    assert torch_alone > 50 * MB
    for name in ("patch-model", "patch-model --link"):
        assert runs[name][0]["peak"] - torch_alone < 100 * MB


@pytest.mark.slow
def test_what_is_sent_to_the_hub(measured: dict[str, Any]) -> None:
    hub = measured["hub"]
    assert hub["whole"] and hub["method"] == "copy"
    assert hub["size"] > 30 * MB and 0 < hub["sent"] < MB


@pytest.mark.slow
def test_the_page(folder: Path, measured: dict[str, Any]) -> None:
    page = (folder / "page.md").read_text()
    for words in ("# Performance: writing a copy", "--gigabytes 0.02", "patch-model --link", "| CPU", "Bytes sent"):
        assert words in page
    assert f"{measured['hub']['sent']:,}" in page
