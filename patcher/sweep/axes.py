"""The axes of the grid: which layers, which coefficients."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import torch

from patcher.recipe.schema import Recipe
from patcher.recipe.vector import VectorSpec
from patcher.vectors.layers import resolve_layers

MOST_LAYERS = 12
_SHARES = (-0.5, -0.25, 0.125, 0.25, 0.5, 0.75, 1.0)
"""Norm of the steering vector over the mean residual norm."""
_KNOWN = (1.0, 2.0)
"""Coefficients that people take without a search, which should be among those that are tried."""
FIXED_DEFAULTS = (("25%", 1.0), ("40%", 1.0), ("50%", 1.0), ("60%", 1.0), ("75%", 1.0), ("40%", 2.0))
"""What people take without a search: a depth and a coefficient (CAA: about 40 % and 1)."""


def swept_vector(recipe: Recipe) -> int:
    """The index of the vector that is swept: `sweep.vector`, else the one with `auto`, else the first."""
    names = [spec.name for spec in recipe.vectors]
    if recipe.sweep.vector is not None:
        return names.index(recipe.sweep.vector)
    return next((index for index, spec in enumerate(recipe.vectors) if spec.swept), 0)


def grid_layers(recipe: Recipe, spec: VectorSpec, block_count: int, where: str) -> list[int]:
    """The layers to try, ascending; those of `auto` have the usual 40 % among them.

    Raises:
        InputError: see :func:`patcher.vectors.layers.resolve_layers`.
    """
    if recipe.sweep.layers != "auto":
        asked = spec.model_copy(update={"layer": recipe.sweep.layers, "before_layer": None})
        return sorted(resolve_layers(asked, block_count, where))
    if spec.layer != "auto" and (recipe.vectors[swept_vector(recipe)].swept):
        # The recipe names the layer and leaves only the coefficient open.
        return sorted(resolve_layers(spec, block_count, where))
    count = min(MOST_LAYERS, block_count)
    spread = {round(index * (block_count - 1) / max(1, count - 1)) for index in range(count)}
    usual = int(0.4 * block_count)
    if usual not in spread:
        spread = (spread - {min(spread, key=lambda layer: abs(layer - usual))}) | {usual}
    return sorted(spread)


def grid_coefficients(recipe: Recipe, spec: VectorSpec, shares: Sequence[float]) -> list[float]:
    """The coefficients to try, ascending.

    Args:
        shares: of every layer, the norm of the vector at coefficient 1 over the mean residual norm.
    """
    if recipe.sweep.coefficients != "auto":
        return sorted(float(value) for value in recipe.sweep.coefficients)
    if spec.coefficient != "auto" and spec.layer == "auto":
        return [spec.factor]
    typical = statistics.median(shares) if shares else 1.0
    chosen = {_rounded(share / typical) for share in _SHARES}
    for known in _KNOWN:
        others = [value for value in chosen if value > 0 and value not in _KNOWN]
        if known not in chosen and others and min(others) / 2 < known < max(chosen):
            chosen = (chosen - {min(others, key=lambda value: abs(math.log(value / known)))}) | {known}
    # Mostly of the recipe's own sign: the others are measured for the curve, and never chosen.
    return sorted(math.copysign(1.0, spec.factor) * value for value in chosen)


def may_be_chosen(recipe: Recipe, spec: VectorSpec, coefficient: float) -> bool:
    """Whether the recipe asks for a coefficient of this sign: by naming it, or by its own coefficient's.

    An automatic grid measures some of the other sign for the curve of effect and damage.
    """
    return recipe.sweep.coefficients != "auto" or coefficient * spec.factor > 0


def default_cells(block_count: int, sign: float = 1.0) -> dict[tuple[int, float], str]:
    """The fixed defaults that the chosen cell is compared with: (layer, coefficient) -> what it is called.

    Args:
        sign: of the recipe's own coefficient.
    """
    cells: dict[tuple[int, float], str] = {}
    for depth, size in FIXED_DEFAULTS:
        coefficient = math.copysign(size, sign)
        layer = min(int(float(depth.rstrip("%")) / 100 * block_count), block_count - 1)
        cells.setdefault((layer, coefficient), f"{depth} depth, {coefficient:+g}")
    return cells


def shares_of(unit_vectors: Mapping[int, torch.Tensor], residual_norms: Mapping[int, float | None]) -> list[float]:
    """Norm of each layer's vector at coefficient 1 over its residual norm, where that is known."""
    return [float(vector.norm()) / norm for layer, vector in unit_vectors.items() if (norm := residual_norms[layer])]


def _rounded(value: float) -> float:
    """To two digits, the second 0 or 5: a coefficient that a person would write."""
    digit = 10.0 ** math.floor(math.log10(abs(value)))
    return float(f"{round(value / digit * 2) / 2 * digit:.6g}")
