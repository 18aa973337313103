"""Cells as `sweep.json` has them, and the chosen one beside its controls, on items that nothing has seen before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from patcher.evaluate.effect import Effect
from patcher.evaluate.held_out import random_like
from patcher.evaluate.scoring import Vectors
from patcher.evaluate.statistics import bootstrap_interval
from patcher.sweep.cells import Cell, CellBench, Column, upper_kl
from patcher.sweep.significance import above_zero

RANDOM_SEEDS = 1
"""For each coefficient; beside the chosen cell there are more (`sweep.random_vectors`)."""


@dataclass(frozen=True)
class ReportRow:
    """One line of the report.

    Attributes:
        name: for people.
        kind: base, recommended, negative, random, default, random_of_default, prompting or prompting_and_steering.
        layer, coefficient: of the swept vector, where there is one.
        vectors: what is added, the recipe's other vectors left out.
    """

    name: str
    kind: str
    layer: int | None
    coefficient: float | None
    vectors: Vectors


def rows_for(
    chosen: tuple[int, float] | None,
    vector_at: Callable[[int, float], torch.Tensor],
    defaults: Mapping[tuple[int, float], str],
    *,
    random_vectors: int,
    seed: int,
    best_default: tuple[int, float] | None = None,
) -> list[ReportRow]:
    """Base, the chosen cell, its negative, random vectors of its norm, the fixed defaults, random vectors of the best.

    Args:
        best_default: the default that has random vectors of its norm beside it; the chosen cell has its own.
    """
    rows = [ReportRow("base", "base", None, None, {})]
    if chosen is not None:
        layer, coefficient = chosen
        vectors = {layer: vector_at(layer, coefficient)}
        rows.append(ReportRow("recommended", "recommended", layer, coefficient, vectors))
        rows.append(ReportRow("its negative", "negative", layer, -coefficient, {layer: -vectors[layer]}))
        for number in range(random_vectors):
            noise = random_like(vectors, seed + number)
            rows.append(ReportRow(f"random vector {number + 1}", "random", layer, None, noise))
    for (layer, coefficient), name in defaults.items():
        rows.append(ReportRow(name, "default", layer, coefficient, {layer: vector_at(layer, coefficient)}))
    if best_default not in (None, chosen):
        layer, coefficient = best_default
        for number in range(random_vectors):
            noise = random_like({layer: vector_at(layer, coefficient)}, seed + number)
            rows.append(ReportRow(f"random vector {number + 1}", "random_of_default", layer, None, noise))
    return rows


def measure_rows(
    bench: CellBench,
    rows: Sequence[ReportRow],
    prompted: Effect | None,
    accepted: Callable[[float, float], bool],
    *,
    seed: int,
) -> list[dict[str, Any]]:
    """`report` of sweep.json.

    Args:
        bench: with the report's items.
        prompted: the same items under the system prompt that asks for the behaviour.
        accepted: whether a KL divergence, the upper end of its interval, and a perplexity are within the guard.
        seed: of the bootstrap and of the sign-flip test.

    Returns:
        The rows. ``p`` is that of a sign-flip test of an effect above 0; ``ahead``, of a default, how much more the
        chosen cell does on the same items, with its interval.
    """
    variants = [bench.with_others(row.vectors) for row in rows]
    values = bench.effect.values(bench.source, variants, bench.effect.count)
    damages = bench.neutral.damage(bench.source, variants)
    base = values[0]

    def measured(name: str, kind: str, values: torch.Tensor) -> dict[str, Any]:
        shifts = (values - base) * bench.expected_sign
        low, high = bootstrap_interval(shifts, seed)
        effect, p = float(shifts.mean()), float(above_zero(shifts[None], seed).p)
        told = {"value": float(values.mean()), "effect": effect, "low": low, "high": high, "p": p}
        return {"name": name, "kind": kind, "items": bench.effect.count, **told}

    found = [
        {
            **measured(row.name, row.kind, value),
            "layer": row.layer,
            "coefficient": row.coefficient,
            # Of the base itself the sums in fp32 leave a trace.
            "damage": damage.mean_kl if variant else 0.0,
            "damage_high": upper_kl(damage) if variant else 0.0,
            "perplexity": damage.perplexity,
            "within_guard": accepted(upper_kl(damage), damage.perplexity),
        }
        for row, variant, value, damage in zip(rows, variants, values, damages, strict=True)
    ]
    chosen = [index for index, row in enumerate(rows) if row.kind == "recommended"]
    for row, value in zip(found, values, strict=True):
        if chosen and row["kind"] == "default":
            ahead = (values[chosen[0]] - value) * bench.expected_sign
            low, high = bootstrap_interval(ahead, seed)
            row |= {"ahead": float(ahead.mean()), "ahead_low": low, "ahead_high": high}
    if prompted is not None:
        beside = [variants[index] for index in (0, *chosen)]
        prompting, *steered = prompted.values(bench.source, beside, prompted.count)
        alone = dict.fromkeys(("layer", "coefficient", "damage", "damage_high", "perplexity", "within_guard"))
        found.append({**measured("system prompt", "prompting", prompting), **alone})
        for index, value in zip(chosen, steered, strict=True):
            both = measured("system prompt and steering", "prompting_and_steering", value)
            found.append({**found[index], **both})
    return found


def random_control(report: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How the chosen cell stands beside random vectors of its norm."""
    effects = [row["effect"] for row in report if row["kind"] == "random"]
    chosen = next((row for row in report if row["kind"] == "recommended"), None)
    if chosen is None or not effects:
        return None
    largest = max(effects, key=abs)
    return {
        "seeds": len(effects),
        "largest_effect": largest,
        "mean": sum(effects) / len(effects),
        "distinguishable": chosen["effect"] > abs(largest),
    }


def cell_json(cell: Cell, within_guard: bool, choosing_low: float | None = None) -> dict[str, Any]:
    """One entry of `grid`.

    Args:
        choosing_low: the lower end of the effect's interval, corrected for the number of cells; None of a cell that may
            not be chosen.
    """
    low, high = cell.interval
    data = cell.as_json()
    del data["effects"]
    return {
        **data,
        "effect": cell.effect,
        "effect_low": low,
        "effect_high": high,
        "choosing_low": choosing_low,
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


def behaviours(report: Sequence[Mapping[str, Any]], pairs: int, name: str) -> list[dict[str, Any]]:
    """`behaviours`: the measure without and with the chosen vector, by behaviour."""
    value = {row["kind"]: row["value"] for row in report if row["kind"] in ("base", "recommended")}
    if "recommended" not in value:
        return []
    return [{"name": name, "pairs": pairs, "base": value["base"], "steered": value["recommended"]}]
