"""In which order cells are measured, and on how much: the whole grid, or successive halving of it; then closer to the
guard, between the best coefficient within it and the next one beyond."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from patcher.sweep.cells import Cell, CellBench, Column
from patcher.sweep.choosing import recommended
from patcher.sweep.record import CellRecord

LARGE_GRID = 150
_KEPT = 3
"""Of the cells of a rung, one in this many goes on."""
_FEWEST_ITEMS = 4
_REFINED = 2
"""The most coefficients that are added."""


def is_halving(search: Literal["auto", "grid", "halving"], cells: int) -> bool:
    """Whether so many cells are searched by successive halving."""
    return search == "halving" or (search == "auto" and cells > LARGE_GRID)


def measure_grid(
    bench: CellBench,
    columns: Sequence[Column],
    record: CellRecord,
    *,
    halving: bool,
    together: bool,
    accepted: Callable[[Cell], bool],
    progress: Callable[[int, int], None],
) -> list[Cell]:
    """Every cell, measured on all choosing items or, with ``halving``, on as many as it was worth.

    Successive halving (Jamieson & Talwalkar 2016, sec. 3): all cells on a few items; the best third, those beyond the
    guard last, on three times as many; until the last on all.

    Args:
        columns: in ascending order of layers, so that residuals are carried on from layer to layer.
        record: finished cells are taken from it and put into it.
        halving: see above.
        together: measure all columns at once, because every call reads the whole model from the disk.
        accepted: whether a cell is within the guard.
        progress: called with the number of measurements done and of all.

    Returns:
        The latest measurement of each cell, in the order of ``columns``.
    """
    count = bench.effect.count
    rungs = _rungs(count) if halving else [count]
    alive = {(column.layer, coefficient) for column in columns for coefficient in column.vectors}
    sizes = [max(1, len(alive) // _KEPT**rung) for rung in range(len(rungs))]
    found: dict[tuple[int, float], Cell] = {}
    done = 0
    for rung, items in enumerate(rungs):
        for group in [columns] if together else [[column] for column in columns]:
            missing = []
            for column in group:
                wanted = {c: v for c, v in column.vectors.items() if (column.layer, c) in alive}
                kept = {c: cell for c in wanted if (cell := record.get(column.layer, c, items)) is not None}
                found.update({(column.layer, c): cell for c, cell in kept.items()})
                done += len(wanted)
                if len(kept) < len(wanted):
                    missing.append(replace(column, vectors={c: v for c, v in wanted.items() if c not in kept}))
            for cell in bench.measure(missing, items=items) if missing else []:
                record.put(cell)
                found[cell.layer, cell.coefficient] = cell
            progress(done, sum(sizes))
        if rung + 1 < len(rungs):
            best = sorted(alive, key=lambda place: (*_worth(found[place], accepted), place))
            alive = set(best[: sizes[rung + 1]])
    return [found[column.layer, coefficient] for column in columns for coefficient in column.vectors]


def _worth(cell: Cell, accepted: Callable[[Cell], bool]) -> tuple[bool, float]:
    """Sorts the best first."""
    return not accepted(cell), -cell.interval[0] if cell.finite else math.inf


def _rungs(count: int) -> list[int]:
    """Numbers of items, each three times the one before, the last all of them."""
    rungs = [count]
    while rungs[0] // _KEPT >= _FEWEST_ITEMS:
        rungs.insert(0, rungs[0] // _KEPT)
    return rungs


def refined(
    cells: Sequence[Cell],
    coefficients: Sequence[float],
    measure: Callable[[Sequence[float]], list[Cell]],
    accepted: Callable[[Cell], bool],
) -> tuple[list[Cell], list[float]]:
    """Add at most two coefficients, each at every layer, so that the grid stays whole.

    As long as the best cell is only held back by the guard, the geometric mean of its coefficient and the next larger
    one is tried. Where the next larger one is within the guard and worse, the effect has its peak, and nothing is
    tried.

    Args:
        measure: measures every layer at some coefficients.

    Returns:
        All cells, by layer and coefficient, and all coefficients, ascending.
    """
    found, tried = list(cells), list(coefficients)
    for _ in range(_REFINED):
        best = recommended(found, accepted)
        middle = None if best is None else _between(best, found, tried, accepted)
        if middle is None:
            break
        found += measure([middle])
        tried.append(middle)
    return sorted(found, key=lambda cell: (cell.layer, cell.coefficient)), sorted(tried)


def _between(
    best: Cell, cells: Sequence[Cell], tried: Sequence[float], accepted: Callable[[Cell], bool]
) -> float | None:
    larger = [value for value in tried if value * best.coefficient > 0 and abs(value) > abs(best.coefficient)]
    if not larger:
        return None
    following = min(larger, key=abs)
    if any(accepted(cell) for cell in cells if (cell.layer, cell.coefficient) == (best.layer, following)):
        return None
    middle = math.copysign(math.sqrt(best.coefficient * following), following)
    rounded = float(f"{middle:.2g}")
    return None if rounded in tried else rounded
