"""Of builds and sweeps every stage is told, and the sum is the total."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from support.building import job_of
from support.sweep_reference import make_model, write_sweep
from support.tiny_models import tiny_checkpoint, write_recipe

from patcher.build.local import build
from patcher.build.result import STAGES
from patcher.progress.clock import Clock
from patcher.sweep.files import write_results
from patcher.sweep.on_base import STAGES as SWEEP_STAGES
from patcher.sweep.pipeline import sweep


def assert_whole(timings: dict[str, float], *worked: str) -> None:
    """The sum is the total, nothing is negative, and these stages took time."""
    seconds = dict(timings)
    assert list(seconds)[-2:] == ["other", "total"]
    assert seconds.pop("total") == round(sum(seconds.values()), 4)
    assert all(value >= 0 for value in seconds.values())
    assert all(seconds[stage] > 0 for stage in worked), seconds


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("timings")
    layer = tiny_checkpoint(folder / "base", "meta-llama--Llama-3.2-1B")
    recipe = write_recipe(folder / "recipe.yaml", folder / "base", layer, folder / "steered", evaluate={})
    clock = Clock(began=time.perf_counter() - 1)
    return build(job_of(recipe, folder / "steered", clock=clock)).as_json()


def test_of_a_build(result: dict[str, Any]) -> None:
    assert list(result["timings"]) == [*STAGES, "other", "total"]
    assert_whole(result["timings"], *(stage for stage in STAGES if stage != "hash"))
    assert result["timings"]["start"] >= 1


def test_parts_are_a_stage(result: dict[str, Any]) -> None:
    parts = result["timing_parts"]
    assert {"effect", "guard", "controls"} <= set(parts["evaluate"]) and {"start", "base", "copy"} <= set(
        parts["verify"]
    )
    assert all(parts["verify"][part] > 0 for part in ("base", "copy"))
    for stage, parts in result["timing_parts"].items():
        assert sum(parts.values()) == pytest.approx(result["timings"][stage], abs=0.002)


def test_of_a_sweep(tmp_path: Path) -> None:
    make_model(tmp_path / "base", "meta-llama--Llama-3.2-1B")
    recipe = write_sweep(tmp_path, tmp_path / "base", {"layer": 1}, sweep={"layers": [1], "coefficients": [0.1]})
    job = job_of(recipe, tmp_path / "sweep")
    swept = sweep(job)
    assert_whole(swept.data["timings"], "plan", "load", "capture", "grid", "report")
    write_results(swept, job, pictures=False)
    timings = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["timings"]
    assert list(timings) == [*SWEEP_STAGES, "other", "total"]
    assert_whole(timings)
