"""Between the best coefficient within the guard and the next one beyond it, a little closer to the guard."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from patcher.sweep.cells import Cell
from patcher.sweep.choosing import recommended

ROUNDS = 2


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
    for _ in range(ROUNDS):
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
