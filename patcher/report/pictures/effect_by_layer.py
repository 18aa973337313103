"""Effect against layer, a line a coefficient (as Rimsky et al. 2024, https://arxiv.org/abs/2312.06681, figure 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from patcher.report.pictures.axes import label_layers, signed_axis
from patcher.report.pictures.reading import (
    cells_along,
    coefficients_of,
    evenly,
    has_numbers,
    layers_of,
    measure_name,
    number,
    recommended_cell,
    rows_of,
    shown_cell,
)
from patcher.report.pictures.style import DASHES, LIGHT, MARKERS, Theme, legend_below, new_figure, sequence, styled
from patcher.report.pictures.text import printable
from patcher.report.pictures.wording import shown

_MOST_LINES = 7
_NAN = float("nan")


def figure(sweep: Mapping[str, Any], theme: Theme = LIGHT) -> Figure | None:
    """The recommended coefficient's line is thick, with its interval; None for fewer than two layers."""
    rows = [row for row in rows_of(sweep, "grid") if number(row.get("layer")) is not None]
    cell = shown_cell(sweep)
    if cell is None or len(layers_of(rows)) < 2 or not has_numbers(rows, "effect"):
        return None
    coefficients = evenly(coefficients_of(rows), _MOST_LINES, keep=cell.coefficient)
    with styled(theme):
        picture = new_figure(4.1)
        axes = picture.subplots()
        axes.axhline(0, color=theme.quiet, linewidth=1)
        for place, (coefficient, colour) in enumerate(
            zip(coefficients, sequence(theme, len(coefficients)), strict=True)
        ):
            line = cells_along(rows, coefficient=coefficient)
            layers = [float(row["layer"]) for row in line]
            chosen = coefficient == cell.coefficient
            if chosen and has_numbers(line, "effect_low"):
                low, high = ([_or_nan(row.get(key)) for row in line] for key in ("effect_low", "effect_high"))
                axes.fill_between(layers, low, high, color=colour, alpha=0.22, linewidth=0, gid="interval")
            axes.plot(
                layers,
                [_or_nan(row.get("effect")) for row in line],
                color=colour,
                marker=MARKERS[place % len(MARKERS)],
                linestyle="-" if chosen else DASHES[place % len(DASHES)],
                linewidth=3.2 if chosen else 1.4,
                markersize=7 if chosen else 5,
                zorder=3 if chosen else 2,
                label=shown(coefficient, digits=4),
                gid=f"effect_{coefficient:g}",
            )
        recommended = recommended_cell(sweep)
        found = [row for row in cells_along(rows, coefficient=cell.coefficient) if row.get("layer") == cell.layer]
        if recommended is not None and has_numbers(found, "effect"):
            axes.plot(
                [_or_nan(cell.layer)],
                [_or_nan(found[0].get("effect"))],
                marker="o",
                markersize=15,
                markerfacecolor="none",
                markeredgecolor=theme.mark,
                markeredgewidth=2,
                linestyle="",
                zorder=4,
                label="recommended",
                gid="recommended",
            )
        label_layers(axes, layers_of(rows))
        signed_axis(axes)
        axes.set_ylabel(printable(f"change of\n{measure_name(sweep)}", longest=60))
        axes.set_title("Effect by layer, one line a coefficient")
        legend_below(picture, axes, 4, title="coefficient")
        return picture


def _or_nan(value: Any) -> float:
    found = number(value)
    return _NAN if found is None else found
