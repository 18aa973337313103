"""Whole sweeps of the quickstart's model: a real vector is recommended and holds in the build, noise is not."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.building import build_recipe, job_of
from support.sweep_reference import LIKED, make_model, write_sweep

from patcher.build.local import build
from patcher.demo.write import write_demo
from patcher.errors import CheckFailed
from patcher.sweep.auto import fill_in
from patcher.sweep.files import write_results
from patcher.sweep.pipeline import sweep

QUICK = ("evaluate.generate_tokens=0", "evaluate.prompts=[]", "evaluate.pictures=false")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("refit", [False, True])
def test_the_recommended_recipe_keeps_its_guard_in_the_build(tmp_path: Path, seed: int, refit: bool) -> None:
    """And the build's vector is the one that was confirmed."""
    path = write_demo(tmp_path / "demo")
    grid = ("sweep.layers=[0, 1]", f"seed={seed}", f"vectors.0.refit={json.dumps(refit)}")
    job = job_of(path, tmp_path / "sweep", *QUICK, *grid)
    found = sweep(job)
    write_results(found, job, pictures=False)
    assert found.chosen is not None, found.data["reason"]
    row = next(row for row in found.data["report"] if row["kind"] == "recommended")
    assert row["within_guard"] and row["low"] > 0 and found.data["random_control"]["distinguishable"]
    assert all(row["effect"] > other["effect"] for other in found.data["report"] if other["kind"] == "default")
    built = build_recipe(tmp_path / "sweep" / "recipe.yaml", tmp_path / "out", *QUICK)
    evaluation = json.loads((built.output / "steering.json").read_text())["evaluation"]
    assert evaluation["guard"]["within"] and evaluation["guard"]["kl"] <= job.recipe.evaluate.guard.kl
    if not refit:
        (vector,) = load_file(built.output / "steering.safetensors").values()
        assert float(vector.norm()) == pytest.approx(14 / 2 * found.chosen[1], rel=1e-5)
        # Of the same pairs: held-out probabilities agree.
        assert evaluation["steered"] == pytest.approx(row["value"], abs=0.02)


@pytest.mark.slow
def test_noise_is_not_recommended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    monkeypatch.delitem(sys.modules, "sweep_noise", raising=False)
    import sweep_noise

    for seed in (2, 5):
        kind = sweep_noise.KINDS[seed % 2]
        found = sweep_noise.sweep_of_noise(kind, 60, seed, tmp_path / str(seed), "sweep.layers=[0, 1, 3]")
        assert found.recommended is None and "choosing items" in found.reason


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "base", "meta-llama--Llama-3.2-1B")


@pytest.mark.slow
def test_auto_names_the_default_that_is_confirmed_and_the_remedy_works(tmp_path: Path, model: Path) -> None:
    """A grid that ends below the default."""
    path = write_sweep(tmp_path / "r", model, {"pairs": LIKED}, sweep={"layers": [0], "coefficients": [0.25]})
    with pytest.raises(CheckFailed) as caught:
        fill_in(job_of(path, tmp_path / "out"))
    told = re.search(r"`layer: (\d+)`, `coefficient: ([\d.]+)`", str(caught.value))
    assert told is not None and "does as much or more" in str(caught.value)
    layer, coefficient = int(told[1]), float(told[2])
    data = json.loads((tmp_path / "out-sweep" / "sweep.json").read_text())
    assert data["recommended"] is None and data["best_default"]["confirmed"] and data["reason"] in str(caught.value)
    assert (data["best_default"]["layer"], data["best_default"]["coefficient"]) == (layer, coefficient)
    written = (f"vectors.0.layer={layer}", f"vectors.0.coefficient={coefficient}")
    built = build(job_of(path, tmp_path / "built", *written))
    assert json.loads((built.output / "steering.json").read_text())["evaluation"]["distinguishable"]


@pytest.mark.slow
def test_auto_keeps_why_in_the_manifest(tmp_path: Path, model: Path) -> None:
    swept = {"layers": [3], "coefficients": [2.0]}
    path = write_sweep(tmp_path / "r", model, {"pairs": LIKED}, sweep=swept)
    job, kept = fill_in(job_of(path, tmp_path / "out"))
    assert (job.recipe.vectors[0].layer, job.recipe.vectors[0].coefficient) == (3, 2.0)
    assert kept["recommended"] == kept["chosen"] == {"layer": 3, "coefficient": 2.0}
    assert "best of 1 cell" in kept["reason"] and kept["best_default"]["name"]


@pytest.mark.slow
def test_a_negative_coefficient_is_recommended_only_if_it_is_asked_for(tmp_path: Path, model: Path) -> None:
    """A vector that points the wrong way: only a negative coefficient does what it is for."""
    made = write_sweep(tmp_path / "made", model, {"pairs": LIKED, "layer": 1, "coefficient": 1.0})
    built = build(job_of(made, tmp_path / "built", "evaluate.enabled=false")).output
    (vector,) = load_file(built / "steering.safetensors").values()
    path = write_sweep(
        tmp_path / "r",
        model,
        {"method": "file", "file": "v.safetensors", "pairs": None, "scale": "raw"},
        sweep={"layers": [1]},
        evaluate={"pairs": LIKED},
    )
    save_file({"v": -vector}, path.parent / "v.safetensors")
    found = sweep(job_of(path, tmp_path / "auto")).data
    assert any(cell["coefficient"] < 0 and cell["effect_low"] > 0 and cell["within_guard"] for cell in found["grid"])
    assert found["recommended"] is found["chosen"] is None
    assert all(cell["choosing_low"] is None for cell in found["grid"] if cell["coefficient"] < 0)
    asked = sweep(job_of(path, tmp_path / "asked", "sweep.coefficients=[-1, 1]")).data
    assert asked["recommended"] == {"layer": 1, "coefficient": -1.0}, asked["reason"]
