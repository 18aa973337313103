"""What a reader must know before the numbers, in plain sentences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from patcher.report.pictures.reading import (
    GridPlace,
    coefficients_of,
    has_numbers,
    layers_of,
    number,
    part_of,
    recommended_cell,
    report_row,
    rows_of,
)
from patcher.report.pictures.wording import cell_name, interval, shown


@dataclass(frozen=True)
class Remark:
    """One sentence.

    Attributes:
        serious: whether the recommendation should not be used as it is.
        text: not escaped.
    """

    serious: bool
    text: str


def remarks(sweep: Mapping[str, Any]) -> list[Remark]:
    """Warnings about the sweep's recommendation; the serious ones first. None of them means that nothing was found."""
    cell = recommended_cell(sweep)
    found = _no_recommendation(sweep) if cell is None else [*_on_the_report_pairs(sweep), *_beside(sweep, cell)]
    return sorted(found, key=lambda remark: not remark.serious)


def _no_recommendation(sweep: Mapping[str, Any]) -> list[Remark]:
    grid = rows_of(sweep, "grid")
    if not grid:
        return [Remark(True, "No cell was measured.")]
    if not any(row.get("within_guard") for row in grid):
        return [
            Remark(
                True,
                f"No cell of the grid is within the guard ({guard_text(sweep)}), so none is recommended. Smaller"
                " coefficients do less damage.",
            )
        ]
    return [Remark(True, "No cell within the guard has an effect in the expected way, so none is recommended.")]


def guard_text(sweep: Mapping[str, Any]) -> str:
    """ "KL divergence at most 0.5 nats a token"."""
    guard = part_of(sweep, "guard")
    if not guard:
        return "none"
    measure = {"kl": "KL divergence", "perplexity": "perplexity"}.get(str(guard.get("measure")), guard.get("measure"))
    limit = number(guard.get("limit"))
    return f"{measure} at most {shown(limit)} {guard.get('unit') or ''}".strip() if limit is not None else str(measure)


def _on_the_report_pairs(sweep: Mapping[str, Any]) -> list[Remark]:
    row = report_row(sweep, "recommended")
    if row is None or number(row.get("effect")) is None:
        return [Remark(True, "The recommended cell was not measured on pairs of its own: its effect is not confirmed.")]
    found = []
    effect, low, high = (number(row.get(key)) for key in ("effect", "low", "high"))
    control = part_of(sweep, "random_control")
    if control.get("distinguishable") is False:
        found.append(
            Remark(
                True,
                f"The effect ({shown(effect, signed=True)}) cannot be told from that of random vectors of equal norm"
                f" (as much as {shown(control.get('largest_effect'))}).",
            )
        )
    elif control.get("distinguishable") is None:
        found.append(Remark(False, "No random vectors were measured beside the recommended cell."))
    if effect is not None and effect < 0:
        found.append(Remark(True, "On the pairs kept for the report the effect goes against the expected way."))
    elif low is not None and high is not None and low <= 0 <= high:
        found.append(
            Remark(True, f"The 95 % interval of the effect on the report pairs holds 0: {interval(low, high)}.")
        )
    if row.get("within_guard") is False:
        found.append(
            Remark(
                True,
                f"The recommended cell exceeds the guard: KL divergence {shown(row.get('damage'))} nats a token"
                f" (guard: {guard_text(sweep)}).",
            )
        )
    prompted = report_row(sweep, "prompting")
    asked = number(prompted.get("effect")) if prompted else None
    if asked is not None and effect is not None and asked >= effect:
        found.append(
            Remark(
                False,
                f"A prompt that asks for the behaviour does as much or more ({shown(asked, signed=True)} beside"
                f" {shown(effect, signed=True)}).",
            )
        )
    return found


def _beside(sweep: Mapping[str, Any], cell: GridPlace) -> list[Remark]:
    """At the grid's edge the best cell may lie outside."""
    rows = rows_of(sweep, "grid")
    layers, coefficients = layers_of(rows), coefficients_of(rows)
    found = []
    if len(coefficients) > 1 and cell.coefficient == max(coefficients, key=abs):
        found.append(
            Remark(
                False,
                f"{_first_upper(cell_name(None, cell.coefficient))} is the strongest of the grid: a stronger one may do"
                " more.",
            )
        )
    if len(layers) > 2 and cell.layer in (layers[0], layers[-1]) and has_numbers(rows, "effect"):
        found.append(
            Remark(False, f"{_first_upper(cell_name(cell.layer, None))} is at the edge of the layers that were tried.")
        )
    return found


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]
