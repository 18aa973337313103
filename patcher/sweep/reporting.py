"""The chosen cell beside its controls, on items that neither the vector nor the choice has seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from patcher.evaluate.effect import Effect
from patcher.evaluate.held_out import random_like
from patcher.evaluate.scoring import Vectors
from patcher.evaluate.statistics import bootstrap_interval
from patcher.sweep.cells import CellBench


@dataclass(frozen=True)
class ReportRow:
    """One line of the report.

    Attributes:
        name: for people.
        kind: base, recommended, negative, random, default, prompting or prompting_and_steering.
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
) -> list[ReportRow]:
    """Base, the chosen cell, its negative, random vectors of its norm, the fixed defaults."""
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
        accepted: whether a KL divergence and a perplexity are within the guard.
        seed: of the bootstrap.
    """
    variants = [bench.with_others(row.vectors) for row in rows]
    values = bench.effect.values(bench.source, variants, bench.effect.count)
    damages = bench.neutral.damage(bench.source, variants)
    base = values[0]
    found = []
    for row, variant, value, damage in zip(rows, variants, values, damages, strict=True):
        found.append(
            {
                **_measured(row.name, row.kind, value, base, bench.expected_sign, seed),
                "layer": row.layer,
                "coefficient": row.coefficient,
                # Of the base itself the sums in fp32 leave a trace.
                "damage": damage.mean_kl if variant else 0.0,
                "perplexity": damage.perplexity,
                "within_guard": accepted(damage.mean_kl, damage.perplexity),
            }
        )
    chosen = next((index for index, row in enumerate(rows) if row.kind == "recommended"), None)
    if prompted is not None:
        beside = [variants[0]] + ([] if chosen is None else [variants[chosen]])
        names = (("system prompt", "prompting"), ("system prompt and steering", "prompting_and_steering"))
        for (name, kind), value in zip(names, prompted.values(bench.source, beside, prompted.count), strict=False):
            same = found[chosen] if kind != "prompting" and chosen is not None else {}
            keys = ("layer", "coefficient", "damage", "perplexity", "within_guard")
            found.append(
                {
                    **_measured(name, kind, value, base, bench.expected_sign, seed),
                    **{key: same.get(key) for key in keys},
                }
            )
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


def _measured(name: str, kind: str, values: torch.Tensor, base: torch.Tensor, sign: float, seed: int) -> dict[str, Any]:
    shifts = (values - base) * sign
    low, high = bootstrap_interval(shifts, seed)
    mean = float(shifts.mean())
    return {"name": name, "kind": kind, "value": float(values.mean()), "effect": mean, "low": low, "high": high}
