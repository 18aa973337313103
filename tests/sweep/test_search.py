"""The whole grid and successive halving: what is measured, on how much, and that both choose the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.sweep_cells import NoisyEffect

from patcher.evaluate.damage import Damage
from patcher.evaluate.guard import within_guard
from patcher.recipe.evaluate import GuardSpec
from patcher.sweep import choosing
from patcher.sweep.cells import CellBench, Column
from patcher.sweep.record import CellRecord
from patcher.sweep.search import LARGE_GRID, is_halving, measure_grid

ITEMS = 36


class Texts:
    """Damage that grows with the vector; a perplexity that depends on how many texts are taken."""

    texts = [(1, 2)] * 12

    def damage(self, _source: object, variants: Sequence[dict[int, torch.Tensor]], texts: int = 12) -> list[Damage]:
        found = []
        for vectors in variants:
            size = sum(abs(float(vector[0])) for vector in vectors.values())
            kl = torch.full((texts,), size / 100, dtype=torch.float64)
            # The later a text, the stranger.
            surprise = -0.1 * torch.arange(1, texts + 1, dtype=torch.float64) - size / 100
            found.append(Damage(kl, surprise, torch.full((texts,), 2)))
        return found


def made(count: int = ITEMS) -> tuple[CellBench, list[Column], NoisyEffect]:
    """27 cells, the effect of each its own; the largest of all are beyond the guard."""
    columns = [
        Column(layer, {float(c): torch.full((2,), float(3 * layer + c)) for c in (1, 2, 3)}, None) for layer in range(9)
    ]
    table = {float(value): 0.05 * value for value in range(1, 28)}
    effect = NoisyEffect(table, count)
    bench = CellBench(object(), effect, Texts(), None, None, 1.0, {}, 4)  # type: ignore[arg-type]
    return bench, columns, effect


def run(folder: Path, bench: CellBench, columns: list[Column], *, halving: bool, **options: Any) -> list[Any]:
    record = CellRecord(folder, {"sweep": 1}, {})
    options = {"together": False, "accepted": lambda cell: cell.damage <= 0.205, **options}
    return measure_grid(bench, columns, record, halving=halving, **{"progress": lambda *_: None, **options})


@pytest.mark.parametrize("together", [False, True])
def test_halving_chooses_what_the_grid_chooses_and_measures_less(tmp_path: Path, together: bool) -> None:
    def accepted(cell: Any) -> bool:
        return bool(cell.damage <= 0.205)

    bench, columns, effect = made()
    whole = run(tmp_path / "grid", bench, columns, halving=False)
    assert effect.measured == 28 * ITEMS  # the base too
    bench, columns, effect = made()
    said: list[tuple[int, int]] = []
    fewer = run(
        tmp_path / "halving",
        bench,
        columns,
        halving=True,
        together=together,
        progress=lambda done, total: said.append((done, total)),
    )
    best = choosing.recommended(whole, accepted)
    found = choosing.recommended(fewer, accepted)
    assert best is not None and found is not None
    assert (best.layer, best.coefficient) == (found.layer, found.coefficient) == (6, 2.0)
    assert found.effects == best.effects
    # 27 cells on 4 items, 9 on 12, 3 on 36, and the base.
    assert effect.measured == 27 * 4 + 9 * 12 + 3 * 36 + 36
    assert sorted(cell.pairs for cell in fewer) == [4] * 18 + [12] * 6 + [36] * 3
    assert [(c.layer, c.coefficient) for c in fewer] == [(c.layer, c.coefficient) for c in whole]
    assert said[-1] == (39, 39)


def test_a_cell_on_few_items_is_judged_by_the_base_on_as_few_texts(tmp_path: Path) -> None:
    bench, columns, _effect = made()
    guard = GuardSpec(kl=None, perplexity=1.2)
    assert bench.texts_for(4) == 2 and bench.texts_for(12) == 4 and bench.texts_for(ITEMS) == 12
    assert bench.base_perplexity(4) < bench.base_perplexity() / 1.5
    cells = run(tmp_path / "out", bench, columns, halving=True)
    for cell in cells:
        expected = math.exp(float(cell.damage)) <= 1.2
        assert within_guard(guard, bench.base_perplexity(cell.pairs), cell.damage, cell.perplexity) == expected


def test_finished_cells_are_not_measured_again(tmp_path: Path) -> None:
    bench, columns, effect = made()
    first = run(tmp_path / "out", bench, columns, halving=True)
    lines = (tmp_path / "out" / "cells.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out" / "cells.jsonl").write_text("".join(lines[:-2]) + lines[-2][: len(lines[-2]) // 2])
    bench, columns, effect = made()
    assert run(tmp_path / "out", bench, columns, halving=True) == first
    assert effect.measured == 2 * 36 + 36


def test_a_few_pairs_are_all_taken_at_once(tmp_path: Path) -> None:
    bench, columns, _effect = made(count=11)
    assert {cell.pairs for cell in run(tmp_path / "out", bench, columns, halving=True)} == {11}


def test_large_grids_are_halved() -> None:
    assert not is_halving("auto", LARGE_GRID) and is_halving("auto", LARGE_GRID + 1)
    assert is_halving("halving", 1) and not is_halving("grid", 10_000)


def test_what_is_no_number_is_beyond_every_guard() -> None:
    none = GuardSpec(kl=None)
    assert within_guard(none, 10.0, 99.0, 1e9)
    assert not within_guard(none, 10.0, math.nan, 12.0) and not within_guard(none, 10.0, 0.1, math.nan)
    assert within_guard(GuardSpec(kl=0.5), 10.0, 0.5, 12.0) and not within_guard(GuardSpec(kl=0.5), 10.0, 0.51, 12.0)
    assert not within_guard(GuardSpec(kl=None, perplexity=1.1), 10.0, 0.1, 12.0)
    assert not within_guard(GuardSpec(kl=None, perplexity=1.1), 10.0, 0.1, math.inf)
