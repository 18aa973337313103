"""Cells made up for the tests of what is done with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from patcher.sweep.cells import Cell


def cell(
    layer: int = 0,
    coefficient: float = 1.0,
    effects: Sequence[float] = (0.2, 0.3, 0.25, 0.22),
    damage: float = 0.1,
    perplexity: float = 12.0,
) -> Cell:
    return Cell(layer, coefficient, tuple(effects), 0.7, damage, perplexity, None, 3.5, 2.0, 20.0)


class NoisyEffect:
    """A measure whose values under a vector are those of its place in a table, plus noise of each item's own."""

    measure = "made up"

    def __init__(self, table: dict[float, float], count: int, noise: float = 0.01) -> None:
        self.table, self.count = table, count
        self.noise = noise * torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.measured = 0

    def values(self, _source: object, variants: Sequence[dict[int, torch.Tensor]], items: int) -> torch.Tensor:
        self.measured += items * len(variants)
        rows = []
        for vectors in variants:
            total = sum(self.table[float(vector[0])] for vector in vectors.values())
            rows.append(total + (self.noise if vectors else 0 * self.noise))
        return torch.stack(rows)[:, :items]
