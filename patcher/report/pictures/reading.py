"""Reading a sweep's values for pictures and tables: whatever is absent, null or not finite is None."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_MEASURES = {
    "on_topic_log_probability": "log-probability of on-topic text",
    "answer_probability": "answer probability",
    "log_odds_per_token": "log-odds (nats a token)",
}


def number(value: Any) -> float | None:
    """``value`` as a finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def or_nan(value: Any) -> float:
    """``value`` as a finite float, or NaN, which matplotlib leaves out."""
    found = number(value)
    return math.nan if found is None else found


def column(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """One value of each row, NaN where it is not there."""
    return [or_nan(row.get(key)) for row in rows]


def place_of(row: Mapping[str, Any]) -> tuple[Any, Any]:
    """The layer and the coefficient of a row."""
    return row.get("layer"), row.get("coefficient")


def rows_of(sweep: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The objects of the list ``sweep[key]``; none where it is absent or null."""
    found = sweep.get(key)
    return [row for row in found if isinstance(row, Mapping)] if isinstance(found, Sequence) else []


def part_of(sweep: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object ``sweep[key]``; an empty one where it is absent or null."""
    found = sweep.get(key)
    return found if isinstance(found, Mapping) else {}


def has_numbers(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(number(row.get(key)) is not None for row in rows)


def layers_of(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Block indices in rising order. A row without one (a build whose vectors sit at several layers) adds none."""
    return sorted({int(row["layer"]) for row in rows if number(row.get("layer")) is not None})


def coefficients_of(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Coefficients in rising order."""
    return sorted({float(row["coefficient"]) for row in rows if number(row.get("coefficient")) is not None})


@dataclass(frozen=True)
class Grid:
    """One value of every cell.

    Attributes:
        layers: of the columns, rising.
        coefficients: of the rows, rising.
        values: (coefficients, layers); None where the cell was not measured.
    """

    layers: list[int]
    coefficients: list[float]
    values: list[list[float | None]]

    def numbers(self) -> list[float]:
        return [value for row in self.values for value in row if value is not None]


def grid_of(sweep: Mapping[str, Any], key: str) -> Grid:
    """``key`` ("effect", "damage", ...) over the cells of ``sweep["grid"]``."""
    rows = rows_of(sweep, "grid")
    layers, coefficients = layers_of(rows), coefficients_of(rows)
    found = {(row.get("layer"), row.get("coefficient")): number(row.get(key)) for row in rows}
    values = [[found.get((layer, coefficient)) for layer in layers] for coefficient in coefficients]
    return Grid(layers, coefficients, values)


def outside_guard(sweep: Mapping[str, Any]) -> list[tuple[int, float]]:
    """(layer, coefficient) of the cells that exceed the guard."""
    return [
        (int(row["layer"]), float(row["coefficient"]))
        for row in rows_of(sweep, "grid")
        if row.get("within_guard") is False
        and number(row.get("layer")) is not None
        and number(row.get("coefficient")) is not None
    ]


@dataclass(frozen=True)
class Cell:
    """A place in the grid; ``layer`` is None for a build whose vectors sit at several layers."""

    layer: int | None
    coefficient: float


def recommended_cell(sweep: Mapping[str, Any]) -> Cell | None:
    cell = part_of(sweep, "recommended")
    coefficient, layer = number(cell.get("coefficient")), number(cell.get("layer"))
    return None if coefficient is None else Cell(None if layer is None else int(layer), coefficient)


def row_at(sweep: Mapping[str, Any], cell: Cell | None) -> Mapping[str, Any] | None:
    """The row of the grid that was measured there."""
    rows = [] if cell is None else cells_along(rows_of(sweep, "grid"), layer=cell.layer)
    return next((row for row in rows if cell is not None and row["coefficient"] == cell.coefficient), None)


def shown_cell(sweep: Mapping[str, Any]) -> Cell | None:
    """The cell that pictures along one axis of the grid go through.

    The recommended one, else the cell with the largest effect in the random control's layer, else in the grid.
    """
    recommended = recommended_cell(sweep)
    if recommended is not None:
        return recommended
    controlled = set(layers_of(rows_of(sweep, "random_grid")))
    measured = [
        (number(row.get("effect")), row)
        for row in rows_of(sweep, "grid")
        if number(row.get("effect")) is not None and number(row.get("coefficient")) is not None
    ]
    inside = [entry for entry in measured if entry[1].get("layer") in controlled] or measured
    if not inside:
        return None
    best = max(inside, key=lambda entry: entry[0] or 0.0)[1]
    layer = number(best.get("layer"))
    return Cell(None if layer is None else int(layer), float(best["coefficient"]))


def cells_along(
    rows: Sequence[Mapping[str, Any]], *, layer: int | None = None, coefficient: float | None = None
) -> list[Mapping[str, Any]]:
    """Rows of one layer by coefficient, or of one coefficient by layer."""
    if coefficient is not None:
        kept = [row for row in rows if row.get("coefficient") == coefficient and number(row.get("layer")) is not None]
        return sorted(kept, key=lambda row: float(row["layer"]))
    kept = [row for row in rows if row.get("layer") == layer and number(row.get("coefficient")) is not None]
    return sorted(kept, key=lambda row: float(row["coefficient"]))


def report_row(sweep: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    """The first row of that kind in ``sweep["report"]``: what was measured on the pairs kept for the report."""
    return next((row for row in rows_of(sweep, "report") if row.get("kind") == kind), None)


def guard_limit(sweep: Mapping[str, Any]) -> float | None:
    """The highest KL divergence that the guard lets pass; None for a guard of another measure."""
    guard = part_of(sweep, "guard")
    return number(guard.get("limit")) if guard.get("measure", "kl") == "kl" else None


def measure_name(sweep: Mapping[str, Any]) -> str:
    """The measure in words; a scorer's own name as it is."""
    measure = sweep.get("measure")
    return _MEASURES.get(str(measure), str(measure)) if measure else "score"


def evenly(items: Sequence[Any], most: int, keep: Any = None) -> list[Any]:
    """At most ``most`` of ``items``, evenly spread, in their order; ``keep`` is among them where it is an item."""
    if len(items) <= most:
        return list(items)
    places = {round(place * (len(items) - 1) / (most - 1)) for place in range(most)} if most > 1 else {0}
    if keep in items and items.index(keep) not in places:
        wanted = items.index(keep)
        places.discard(min(places, key=lambda place: abs(place - wanted)))
        places.add(wanted)
    return [items[place] for place in sorted(places)]
