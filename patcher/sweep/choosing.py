"""Which cell is chosen on the choosing items, by a rule that is stated beside it.

What is chosen is recommended only where the items that were kept back confirm it: :mod:`patcher.sweep.confirming`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from patcher.evaluate.statistics import bootstrap_interval
from patcher.recipe.evaluate import GuardSpec
from patcher.sweep.cells import Cell
from patcher.sweep.significance import above_zero

Place = tuple[int, float]


def rule(guard: GuardSpec) -> str:
    """The rule in words."""
    limits = []
    if guard.kl is not None:
        limits.append(f"whose KL divergence on neutral text is at most {guard.kl:g} nats a token (95 % interval)")
    if guard.perplexity is not None:
        limits.append(f"whose perplexity on neutral text is at most {guard.perplexity:g} times the base's")
    return (
        "of the cells whose effect on the choosing items is above 0 when that is corrected for the number of cells"
        + (f", and {' and '.join(limits)}" if limits else "")
        + ", the one with the largest lower end of its 95 % interval; it is recommended if the items that were kept "
        "back confirm it: an interval above 0, and an effect larger than that of every random vector of equal norm and "
        "of every fixed default within the guard"
    )


@dataclass(frozen=True)
class Choice:
    """What the choosing items say.

    Attributes:
        ranked: the cells that were compared, best first.
        lows: of each, the lower end of its interval, corrected for the number of cells.
        items: on how many items they were compared.
    """

    ranked: tuple[Cell, ...] = ()
    lows: Mapping[Place, float] = field(default_factory=dict)
    items: int = 0

    @property
    def above_zero(self) -> tuple[Cell, ...]:
        """Those whose effect is above zero, best first."""
        return tuple(cell for cell in self.ranked if self.lows[cell.layer, cell.coefficient] > 0)


def compared(cells: Sequence[Cell], accepted: Callable[[Cell], bool]) -> Choice:
    """The cells that may be chosen, by the lower ends of their effects, and which of the effects are above zero.

    The best of many noisy cells owes much to luck, and a mean that few items carry owes most. The correction asks for
    an effect that luck does not give to any cell, and the lower end for one on which the items agree. Only cells that
    were measured on the most items are compared, on those items that did not decide which cells are measured on more.
    Among equals the one with the least damage is taken.

    Args:
        accepted: whether a cell may be chosen.
    """
    most = max(cell.pairs for cell in cells)
    seen = max((cell.pairs for cell in cells if cell.pairs < most), default=0)
    kept = [cell for cell in cells if cell.pairs == most and cell.finite and accepted(cell)]
    if not kept:
        return Choice(items=most - seen)
    effects = torch.tensor([cell.effects[seen:] for cell in kept], dtype=torch.float64)
    lows = {(c.layer, c.coefficient): low for c, low in zip(kept, above_zero(effects, 0).lows.tolist(), strict=True)}

    def order(cell: Cell) -> tuple[float, float, int]:
        own = bootstrap_interval(cell.effects[seen:], 0) if seen else cell.interval
        return -own[0], cell.damage, cell.layer

    return Choice(tuple(sorted(kept, key=order)), lows, most - seen)


def recommended(cells: Sequence[Cell], accepted: Callable[[Cell], bool]) -> Cell | None:
    """The best cell of :func:`compared`; None if no effect is above zero."""
    return next(iter(compared(cells, accepted).above_zero), None)


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
