"""Finished cells on the disk: kept line by line, taken again, and never another sweep's."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.sweep_cells import cell

from patcher.errors import InputError, OutsideError
from patcher.sweep.cells import Cell
from patcher.sweep.record import CELLS, CellRecord

PRINT = {"recipe": {"seed": 0, "coefficients": [0.1, 1e-7]}, "content": "ab"}
SETTINGS = {"guard": 1}


def test_what_is_put_is_on_the_disk_and_comes_back(tmp_path: Path) -> None:
    record = CellRecord(tmp_path / "a" / "out", PRINT, SETTINGS)
    record.put(cell(3, 0.1))
    lines = (tmp_path / "a" / "out" / CELLS).read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[1])["layer"] == 3
    again = CellRecord(tmp_path / "a" / "out", PRINT, SETTINGS)
    assert len(again) == 1 and again.get(3, 0.1, 4) == cell(3, 0.1)
    assert again.get(3, 0.1, 12) is None and again.get(3, 0.2, 4) is None


numbers = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(numbers, min_size=1, max_size=5), numbers, numbers)
def test_every_number_survives(effects: list[float], damage: float, perplexity: float) -> None:
    before = cell(effects=effects, damage=damage, perplexity=perplexity)
    assert Cell.from_json(json.loads(json.dumps(before.as_json(), allow_nan=False))) == before


def test_what_is_no_number_is_null_and_stays_none(tmp_path: Path) -> None:
    CellRecord(tmp_path / "out", PRINT, SETTINGS).put(cell(effects=(math.nan, math.inf), damage=math.nan))
    line = (tmp_path / "out" / CELLS).read_text().splitlines()[1]
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name))["effects"] == [None, None]
    found = CellRecord(tmp_path / "out", PRINT, SETTINGS).get(0, 1.0, 2)
    assert found is not None and not found.finite and math.isnan(found.damage) and found.perplexity == 12.0


@pytest.mark.parametrize("tail", ['{"layer": 0, "coef', "[]", "null", "{}", '{"effects": []}', "\x00\x00", '"x"'])
def test_a_broken_line_is_measured_again_and_gone(tmp_path: Path, tail: str) -> None:
    record = CellRecord(tmp_path, PRINT, SETTINGS)
    record.put(cell(0))
    with (tmp_path / CELLS).open("a") as file:
        file.write(tail)
    again = CellRecord(tmp_path, PRINT, SETTINGS)
    again.put(cell(1))
    assert len(CellRecord(tmp_path, PRINT, SETTINGS)) == 2
    assert len((tmp_path / CELLS).read_text().splitlines()) == 3


def test_another_sweep_is_refused_and_replaced_with_force(tmp_path: Path) -> None:
    CellRecord(tmp_path, PRINT, SETTINGS).put(cell(0))
    before = (tmp_path / CELLS).read_bytes()
    with pytest.raises(InputError, match="another sweep"):
        CellRecord(tmp_path, {**PRINT, "content": "cd"}, SETTINGS)
    assert (tmp_path / CELLS).read_bytes() == before
    assert len(CellRecord(tmp_path, {**PRINT, "content": "cd"}, SETTINGS, force=True)) == 0


def test_cells_outlive_other_settings(tmp_path: Path) -> None:
    """Those of what a cell does not depend on; the results beside the cells are not theirs."""
    record = CellRecord(tmp_path, PRINT, SETTINGS)
    record.put(cell(0))
    assert not record.same and CellRecord(tmp_path, PRINT, SETTINGS).same
    again = CellRecord(tmp_path, PRINT, {**SETTINGS, "guard": 2})
    assert len(again) == 1 and not again.same
    again = CellRecord(tmp_path, PRINT, {**SETTINGS, "guard": 2})
    assert len(again) == 1 and again.same


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_with_other_things_is_not_touched(tmp_path: Path, force: bool) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="something else"):
        CellRecord(tmp_path, PRINT, SETTINGS, force=force)
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="not a folder"):
        CellRecord(tmp_path / "file", PRINT, SETTINGS, force=force)


def test_killed_before_the_first_line(tmp_path: Path) -> None:
    (tmp_path / (CELLS + ".partial")).write_text('{"form')
    assert len(CellRecord(tmp_path, PRINT, SETTINGS)) == 0
    assert [item.name for item in tmp_path.iterdir()] == [CELLS]


def test_cells_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / CELLS).write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read"):
        CellRecord(tmp_path, PRINT, SETTINGS)
    assert len(CellRecord(tmp_path, PRINT, SETTINGS, force=True)) == 0


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = CellRecord(tmp_path / "out", PRINT, SETTINGS)

    def full(_number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutsideError, match="cannot be written") as caught:
        record.put(cell(0))
    assert caught.value.exit_code == 3 and "No space left" in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permissions(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(OutsideError):
        CellRecord(tmp_path / "out", PRINT, SETTINGS)
    (tmp_path / "out").chmod(0o000)
    with pytest.raises(OutsideError):
        CellRecord(tmp_path / "out", PRINT, SETTINGS)
    (tmp_path / "out").chmod(0o700)
