"""Cells as `sweep.json` has them, and the controls beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from patcher.evaluate.held_out import random_like
from patcher.sweep.cells import Cell, CellBench, Column
from patcher.sweep.reporting import ReportRow

RANDOM_SEEDS = 1
"""For each coefficient; beside the chosen cell there are more (`sweep.random_vectors`)."""


def cell_json(cell: Cell, within_guard: bool) -> dict[str, Any]:
    """One entry of `grid`."""
    low, high = cell.interval
    data = cell.as_json()
    del data["effects"]
    return {
        **data,
        "effect": cell.effect,
        "effect_low": low,
        "effect_high": high,
        "within_guard": within_guard,
        "pairs": cell.pairs,
    }


def random_grid(
    bench: CellBench,
    unit: Mapping[int, torch.Tensor],
    layer: int,
    coefficients: Sequence[float],
    seed: int,
) -> list[dict[str, Any]]:
    """`random_grid`: a random vector of equal norm at one layer, for each coefficient.

    Args:
        unit: layer -> the vector at coefficient 1.
    """
    runs = []
    for run in range(RANDOM_SEEDS):
        noise = {value: random_like({layer: value * unit[layer]}, seed + run)[layer] for value in coefficients}
        runs.append(bench.measure([Column(layer, noise, None)]))
    return [
        {
            "layer": layer,
            "coefficient": coefficient,
            "effect": sum(cell.effect for cell in cells) / len(cells),
            "damage": sum(cell.damage for cell in cells) / len(cells),
        }
        for coefficient, cells in zip(coefficients, zip(*runs, strict=True), strict=True)
    ]


def behaviours(bench: CellBench, rows: Sequence[ReportRow], name: str) -> list[dict[str, Any]]:
    """`behaviours`: the measure without and with the chosen vector, by behaviour."""
    chosen = next((row for row in rows if row.kind == "recommended"), None)
    if chosen is None:
        return []
    variants = [bench.with_others(row.vectors) for row in (rows[0], chosen)]
    values = bench.effect.values(bench.source, variants, bench.effect.count)
    base, steered = values.double().mean(dim=1).tolist()
    return [{"name": name, "pairs": bench.effect.count, "base": base, "steered": steered}]
