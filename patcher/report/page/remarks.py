"""What a reader must know before the numbers, in plain sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from patcher.report.pictures.reading import (
    GridPlace,
    along,
    has_numbers,
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
    if cell is None:
        return [Remark(True, _why_none(sweep))]
    found = [Remark(*told) for told in (*_on_the_report_pairs(sweep), *_beside(sweep, cell))]
    return sorted(found, key=lambda remark: not remark.serious)


def _why_none(sweep: Mapping[str, Any]) -> str:
    if sweep.get("reason"):
        return str(sweep["reason"])
    grid = rows_of(sweep, "grid")
    if not grid:
        return "No cell was measured."
    if not any(row.get("within_guard") for row in grid):
        return (
            f"No cell of the grid is within the guard ({guard_text(sweep)}), so none is recommended. Smaller"
            " coefficients do less damage."
        )
    return "No cell within the guard has an effect in the expected way, so none is recommended."


def guard_text(sweep: Mapping[str, Any]) -> str:
    """ "KL divergence at most 0.5 nats a token"."""
    guard = part_of(sweep, "guard")
    if not guard:
        return "none"
    measure = {"kl": "KL divergence", "perplexity": "perplexity"}.get(str(guard.get("measure")), guard.get("measure"))
    limit = number(guard.get("limit"))
    return f"{measure} at most {shown(limit)} {guard.get('unit') or ''}".strip() if limit is not None else str(measure)


def _on_the_report_pairs(sweep: Mapping[str, Any]) -> Iterator[tuple[bool, str]]:
    """Whether it is serious, and what there is to say."""
    row = report_row(sweep, "recommended")
    if row is None or number(row.get("effect")) is None:
        yield True, "The recommended cell was not measured on pairs of its own: its effect is not confirmed."
        return
    effect, low, high = (number(row.get(key)) for key in ("effect", "low", "high"))
    control = part_of(sweep, "random_control")
    if control.get("distinguishable") is False:
        largest = shown(control.get("largest_effect"))
        told = f"The effect ({shown(effect, signed=True)}) cannot be told from that of random vectors of equal norm"
        yield True, f"{told} (as much as {largest})."
    elif control.get("distinguishable") is None:
        yield False, "No random vectors were measured beside the recommended cell."
    if effect is not None and effect < 0:
        yield True, "On the pairs kept for the report the effect goes against the expected way."
    elif low is not None and high is not None and low <= 0 <= high:
        yield True, f"The 95 % interval of the effect on the report pairs holds 0: {interval(low, high)}."
    if row.get("within_guard") is False:
        told = f"The recommended cell exceeds the guard: KL divergence {shown(row.get('damage'))} nats a token"
        yield True, f"{told} (guard: {guard_text(sweep)})."
    prompted = report_row(sweep, "prompting")
    asked = number(prompted.get("effect")) if prompted else None
    if asked is not None and effect is not None and asked >= effect:
        beside = f"{shown(asked, signed=True)} beside {shown(effect, signed=True)}"
        yield False, f"A prompt that asks for the behaviour does as much or more ({beside})."


def _beside(sweep: Mapping[str, Any], cell: GridPlace) -> Iterator[tuple[bool, str]]:
    """At the grid's edge the best cell may lie outside."""
    rows = rows_of(sweep, "grid")
    layers, coefficients = along(rows, "layer"), along(rows, "coefficient")
    if len(coefficients) > 1 and cell.coefficient == max(coefficients, key=abs):
        name = cell_name(None, cell.coefficient).capitalize()
        yield False, f"{name} is the strongest of the grid: a stronger one may do more."
    if len(layers) > 2 and cell.layer in (layers[0], layers[-1]) and has_numbers(rows, "effect"):
        yield False, f"{cell_name(cell.layer, None).capitalize()} is at the edge of the layers that were tried."
