"""`patch-model sweep` as a person, and as a program, uses it: exit codes, --json, interruptions, what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.command_line import Run, runner
from support.sweep_reference import LIKED, make_model, write_sweep

from patcher.cli import main
from patcher.demo.write import write_demo
from patcher.sweep.cells import CellBench
from patcher.sweep.record import CELLS
from patcher.sweep.reporting import RANDOM_SEEDS

GRID = {"layers": [1, 2, 3], "coefficients": [-0.5, 0.5, 1.0]}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys, "sweep", after=("--no-pictures",))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    model = make_model(folder / "model", "meta-llama--Llama-3.2-1B")
    guard = {"guard": {"kl": 0.08}}
    return write_sweep(folder / "recipe", model, {"pairs": LIKED}, sweep=GRID, evaluate=guard)


@pytest.fixture(scope="module")
def whole(recipe: Path) -> dict[str, Any]:
    """The result of a sweep that nothing interrupts."""
    folder = recipe.parent / "whole"
    with pytest.raises(SystemExit):
        main(["sweep", str(recipe), "-o", str(folder), "--no-pictures"])
    return read(folder)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[float]]]:
    """Layer and coefficients of each column that is measured in this process."""
    found: list[tuple[int, list[float]]] = []
    measure = CellBench.measure

    def counted(self: CellBench, columns: Any, **options: Any) -> Any:
        found.extend((column.layer, list(column.vectors)) for column in columns)
        return measure(self, columns, **options)

    monkeypatch.setattr(CellBench, "measure", counted)
    return found


def read(folder: Path) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found: dict[str, Any] = json.loads((folder / "sweep.json").read_text(), parse_constant=refuse)
    return found


def alike(first: Any, second: Any) -> bool:
    """Equal but for the last bits of a sum."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(alike(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(alike, first, second))
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=1e-5, abs_tol=1e-6)
    return bool(first == second)


def test_the_demo_from_end_to_end(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_demo(tmp_path / "demo")
    grid = ("--set", "sweep.layers=[1]", "--set", "sweep.coefficients=[-1, 1]", "--set", "evaluate.generate_tokens=2")
    code, out, err = run(path, "-o", tmp_path / "out", "--json", *grid)
    found = json.loads(out)  # one object, and nothing else
    assert code == 0 and found["output"] == str(tmp_path / "out")
    assert found["recommended"] == {"layer": 1, "coefficient": 1.0} and found["search"] == "grid"
    assert found["random_control"]["distinguishable"] and "recommended" in err
    assert found["splits"] == {"make": 72, "choose": 24, "report": 24}
    row = next(row for row in found["report"] if row["kind"] == "recommended")
    assert row["low"] > 0.1 and row["within_guard"]
    data = read(tmp_path / "out")
    assert {key: value for key, value in found.items() if key != "output"} == data
    assert sorted(item.name for item in (tmp_path / "out").iterdir()) == [
        "cells.jsonl", "recipe.yaml", "sweep.csv", "sweep.json",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as done:
        main([str(tmp_path / "out" / "recipe.yaml"), "--dry-run", "--json", "--output", str(tmp_path / "built")])
    assert not done.value.code
    (vector,) = json.loads(capsys.readouterr().out)["vectors"]
    assert vector["layers"] == [1] and vector["coefficient"] == 1.0


def test_without_matplotlib_it_is_said_before_anything_is_measured(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patcher.report.pictures.drawing.can_draw", lambda: False)
    with pytest.raises(SystemExit) as done:
        main(["sweep", str(recipe), "-o", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert done.value.code == 2 and "patch-model[plots]" in err and "--no-pictures" in err
    assert not (tmp_path / "out").exists()


INTERRUPTED = """
import os, sys
from patcher.sweep.record import CellRecord
put, left = CellRecord.put, [int(sys.argv[1])]
def counted(self, cell):
    put(self, cell)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), int(sys.argv[2]))
CellRecord.put = counted
from patcher.cli import main
main(sys.argv[3:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_sweep_goes_on(
    run: Run, recipe: Path, whole: dict[str, Any], tmp_path: Path, measured: list[tuple[int, list[float]]], number: int
) -> None:
    arguments = ["sweep", str(recipe), "-o", str(tmp_path / "out"), "--no-pictures"]
    stopped = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, "4", str(int(number)), *arguments], capture_output=True, text=True
    )
    if number == signal.SIGINT:
        assert stopped.returncode == 130 and "Traceback" not in stopped.stderr
        assert "4 finished cells are kept" in stopped.stderr and "the same command goes on" in stopped.stderr
        assert [item.name for item in tmp_path.iterdir()] == ["out"]
    else:
        assert stopped.returncode == -signal.SIGKILL
    assert len((tmp_path / "out" / CELLS).read_text().splitlines()) == 5
    with (tmp_path / "out" / CELLS).open("a") as file:
        file.write('{"layer": 1, "coeff')
    code, _out, err = run(recipe, "-o", tmp_path / "out")
    assert code == 0 and "4 finished cells are taken" in err
    # The others of a column, whole columns, the fixed default that is not in the grid, and then the random vectors.
    assert measured[:3] == [(2, [0.5, 1.0]), (3, [-0.5, 0.5, 1.0]), (1, [2.0])] and len(measured) == 3 + RANDOM_SEEDS
    found = read(tmp_path / "out")
    found.pop("timings")
    assert alike(found, {key: value for key, value in whole.items() if key != "timings"})
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_another_guard_and_grid_take_the_cells_that_are_there(
    run: Run, recipe: Path, whole: dict[str, Any], tmp_path: Path, measured: list[tuple[int, list[float]]]
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(recipe.parent / "whole", folder)
    changed = ("--set", "sweep.coefficients=[0.5, 0.75]", "--set", "evaluate.guard.kl=0.000001")
    # Nothing within that guard: and no recipe of the older sweep is left beside the new grid.
    code, out, err = run(recipe, "-o", folder, "--json", *changed)
    assert code == 1 and json.loads(out)["recommended"] is None and f"{len(whole['grid']) + 1} finished cells" in err
    assert measured[:3] == [(layer, [0.75]) for layer in GRID["layers"]] and len(measured) == 3 + RANDOM_SEEDS
    found = read(folder)
    assert found["coefficients"] == [0.5, 0.75] and len(found["grid"]) == 6
    assert not (folder / "recipe.yaml").exists()
    old = {(cell["layer"], cell["coefficient"]): cell["effect"] for cell in whole["grid"]}
    assert all(cell["effect"] == old[cell["layer"], 0.5] for cell in found["grid"] if cell["coefficient"] == 0.5)


def test_another_recipe_is_refused_and_force_starts_anew(
    run: Run, recipe: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(recipe.parent / "whole", folder)
    before = {item.name: item.read_bytes() for item in folder.iterdir()}
    changed = ("--set", "seed=7", "--set", "evaluate.guard.kl=0.000001")
    code, _out, err = run(recipe, "-o", folder, *changed)
    assert code == 2 and "another sweep" in err and "--force" in err
    assert {item.name: item.read_bytes() for item in folder.iterdir()} == before
    # Nothing within that guard: and no recipe of the older sweep is left beside the new grid.
    code, out, err = run(recipe, "-o", folder, "--force", "--json", *changed)
    assert code == 1 and json.loads(out)["recommended"] is None and "nothing recommended" in err
    assert read(folder)["recommended"] is None and not (folder / "recipe.yaml").exists()
    assert {row["kind"] for row in read(folder)["report"]} == {"base", "default"}


def test_a_folder_with_other_things_is_not_touched(run: Run, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    for options in ((), ("--force",)):
        code, _out, err = run(recipe, "-o", tmp_path / "out", *options)
        assert code == 2 and "something else" in err
    assert [item.name for item in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_coefficients_beyond_all_numbers(run: Run, recipe: Path, tmp_path: Path) -> None:
    """Logits become NaN: the grid says so with null, and no such cell is chosen, not even without a guard."""
    model = make_model(tmp_path / "bloom", "bloom")
    options = ("--set", f"model={model}", "--set", "evaluate.guard.kl=null", "--set", "sweep.layers=[1, 2]")
    code, out, err = run(recipe, "-o", tmp_path / "out", "--json", *options, "--set", "sweep.coefficients=[2.5, 1e+30]")
    found = json.loads(out, parse_constant=lambda name: pytest.fail(name))
    assert code == 0 and read(tmp_path / "out")["grid"] == found["grid"] and "no number" in err
    for cell in found["grid"]:
        huge = cell["coefficient"] == 1e30
        assert (cell["effect"] is None, cell["damage"] is None, not cell["within_guard"]) == (huge, huge, huge)
    assert found["recommended"]["coefficient"] == 2.5 and {cell["coefficient"] for cell in found["pareto"]} == {2.5}
    code, out, _err = run(recipe, "-o", tmp_path / "none", "--json", *options, "--set", "sweep.coefficients=[1e+30]")
    assert code == 1 and json.loads(out)["recommended"] is None
    # More than fp32 holds is refused in words.
    code, _out, err = run(recipe, "-o", tmp_path / "more", *options, "--set", "sweep.coefficients=[1.0e+300]")
    assert code == 2 and "finite" in err


def test_a_full_disk_is_said_and_what_was_measured_stays(
    run: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync = [], os.fsync

    def full(number: int) -> None:
        synced.append(number)
        if len(synced) > 3:
            raise OSError(28, "No space left on device")
        fsync(number)

    monkeypatch.setattr("patcher.sweep.record.os.fsync", full)
    code, out, err = run(recipe, "-o", tmp_path / "out", "--json")
    assert code == 3 and json.loads(out)["error"]["code"] == "disk" and "No space left" in err
    assert (
        len((tmp_path / "out" / CELLS).read_text().splitlines()) >= 4 and not (tmp_path / "out" / "sweep.json").exists()
    )


@pytest.mark.slow
def test_halving_says_on_how_many_pairs_a_cell_was_seen(
    run: Run, recipe: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    options = ("--set", "sweep.search=halving", "--set", "sweep.choose=0.5")
    code, out, _err = run(recipe, "-o", tmp_path / "out", "--json", *options)
    found = json.loads(out)
    assert code in (0, 1) and found["search"] == "halving" and found["splits"]["choose"] == 12
    assert sorted(cell["pairs"] for cell in found["grid"]) == [4] * 6 + [12] * 3
    code, out, _err = run(recipe, "-o", tmp_path / "grid", "--json", "--set", "sweep.search=grid", *options[2:])
    every = json.loads(out)
    assert every["recommended"] == found["recommended"]
    for cell, other in zip(found["grid"], every["grid"], strict=True):
        # The lower end is corrected for other numbers of cells and items.
        corrected = {"choosing_low": None}
        assert cell["pairs"] < 12 or alike(cell | corrected, other | corrected)


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_only_the_first_sweeps(
    run: Run, recipe: Path, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    world = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
    for name, value in {**world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29999}.items():
        monkeypatch.setenv(name, str(value))
    shutil.copytree(recipe.parent / "whole", tmp_path / "out")
    code, out, err = run(recipe, "-o", tmp_path / "out", "--json")
    assert code == 0 and (bool(json.loads(out)["grid"]) if rank == 0 else out == err == "")


def test_what_is_refused(run: Run, recipe: Path, tmp_path: Path) -> None:
    def refused(*overrides: str, code: int = 2) -> str:
        sets = [part for override in overrides for part in ("--set", override)]
        found, out, err = run(recipe, "-o", tmp_path / "out", "--json", *sets)
        assert found == code and list(json.loads(out)) == ["error"] and not (tmp_path / "out").exists()
        return err

    assert "nobody" in refused("sweep.vector=nobody")
    other = {"name": "b", "pairs": [{"positive": "a", "negative": "b"}], "layer": 1}
    both = json.dumps([{**other, "name": "a", "layer": "auto"}, other])
    assert "one with `auto`" in refused(f"vectors={both}", "sweep.vector=b")
    assert "decoder blocks" in refused("sweep.layers=[99]")
    assert "adds nothing" in refused("sweep.coefficients=[0, 1]")
    persona = '{method: persona, layer: auto, questions: ["a?", "b?"], personas: {positive: yes-man, negative: no-man}}'
    assert "persona" in refused(f"vectors=[{persona}]")
    bare = tmp_path / "bare"
    shutil.copytree(recipe.parent.parent / "model", bare, ignore=shutil.ignore_patterns("token*", "special*"))
    save_file({"v": torch.ones(64)}, recipe.parent / "v.safetensors")
    assert "tokenizer" in refused(f"model={bare}", "vectors=[{method: file, file: v.safetensors, layer: 1}]")
    (recipe.parent / "short.txt").write_text("\n\n")
    assert "text is empty" in refused("evaluate.neutral=short.txt")
