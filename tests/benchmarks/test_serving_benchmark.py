"""The benchmark of running a copy runs, and its ratios are of one turn. Nothing is said about time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from support.benchmark_runs import run_benchmark

BENCHMARKS = Path(__file__).parent
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "serving_workers")]

from serving_parts.page import ratio, ratios  # noqa: E402
from turns import take_turns, tried  # noqa: E402


def test_turns_begin_with_another_one_each_time_and_a_short_answer_is_refused():
    called = []

    def generate(name: str) -> int:
        called.append(name)
        return 3

    request = {"repeats": 2, "tokens": 3}
    found = take_turns({name: lambda name=name: generate(name) for name in ("a", "b")}, request)
    assert "".join(called) == "ab" + "ab" + "ba"
    assert {name: len(rates) for name, rates in found.items()} == {"a": 2, "b": 2}
    assert tried(lambda: take_turns({"a": lambda: 2}, request)) == {
        "error": "RuntimeError: a made 2 tokens instead of 3"
    }


def test_a_ratio_is_of_the_same_turn():
    found = {"routes": {"flag": {"rates": {"base": [10.0, 20.0, 40.0], "copy": [9.0, 20.0, 44.0]}}}}
    assert ratios(found, "flag", "copy") == pytest.approx([0.9, 1.0, 1.1])
    assert ratio(found, "flag", "copy") == "1.000 (0.950 to 1.050)"
    assert ratio(found, "flag", "hooked") == ratio(found, "carrier", "copy") == ratio({}, "flag", "copy") == "not run"


@pytest.mark.slow
def test_the_page(tmp_path, monkeypatch):
    monkeypatch.setenv("PATCH_MODEL_VLLM", str(tmp_path / "none"))
    options = ("--tiny", "--repeats", 2, "--tokens", 4, "--stacks", "transformers,vllm", "--routes", "flag,carrier")
    run_benchmark(BENCHMARKS / "serving.py", tmp_path, *options)
    record = json.loads((tmp_path / "record.json").read_text())["stacks"]
    for route in ("flag", "carrier"):
        rates = record["transformers"]["routes"][route]["rates"]
        assert {name: len(each) for name, each in rates.items()} == dict.fromkeys(
            ("base", "base again", "hooked", "copy"), 2
        )
    assert "none" in record["vllm"]["missing"]
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("# Performance: running a copy") and "Not run: " in page
    (carrier,) = (line for line in page.splitlines() if line.startswith("| `carrier` | one block more"))
    # Two blocks of the base are three of the copy.
    assert 1.1 < float(carrier.split("|")[3]) < 1.5
