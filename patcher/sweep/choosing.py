"""Which cell is recommended, by a rule that is stated beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from patcher.recipe.evaluate import GuardSpec
from patcher.sweep.cells import Cell


def rule(guard: GuardSpec) -> str:
    """The rule in words."""
    limits = []
    if guard.kl is not None:
        limits.append(f"whose KL divergence on neutral text is at most {guard.kl:g} nats a token")
    if guard.perplexity is not None:
        limits.append(f"whose perplexity on neutral text is at most {guard.perplexity:g} times the base's")
    return (
        "the cell whose effect on the choosing items has the largest lower end of its 95 % interval, if that is above 0"
        + (f", and {' and '.join(limits)}" if limits else "")
    )


def recommended(cells: Sequence[Cell], accepted: Callable[[Cell], bool]) -> Cell | None:
    """The cell within the guard whose effect has the largest lower end; None if none is above 0.

    The best of many noisy cells owes much to luck, and a mean that few items carry owes most; the lower end asks for an
    effect on which the items agree. Only cells that were measured on the most items are compared, and among equals the
    one with the least damage is taken.
    """
    most = max(cell.pairs for cell in cells)
    candidates = [
        cell for cell in cells if cell.pairs == most and cell.finite and cell.interval[0] > 0 and accepted(cell)
    ]
    return min(candidates, key=lambda cell: (-cell.interval[0], cell.damage, cell.layer), default=None)


def strongest(cells: Sequence[Cell]) -> Cell:
    """The cell with the largest effect, whatever its damage; one whose numbers are finite, if there is any."""
    return max(cells, key=lambda cell: cell.effect if cell.finite else -math.inf)


def pareto(cells: Sequence[Cell]) -> list[Cell]:
    """Cells that no other one beats in both effect and damage, by rising damage."""
    front: list[Cell] = []
    finite = [cell for cell in cells if cell.finite]
    for cell in sorted(finite, key=lambda cell: (cell.damage, -cell.effect)):
        if cell.effect > 0 and (not front or cell.effect > front[-1].effect):
            front.append(cell)
    return front
