"""Effect against layer, a line a coefficient (as Rimsky et al. 2024, https://arxiv.org/abs/2312.06681, figure 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from patcher.report.pictures.axes import effect_axis, label_layers
from patcher.report.pictures.reading import (
    cells_along,
    coefficients_of,
    column,
    evenly,
    has_numbers,
    layers_of,
    number,
    or_nan,
    recommended_cell,
    row_at,
    rows_of,
    shown_cell,
)
from patcher.report.pictures.style import (
    DASHES,
    LIGHT,
    MARKERS,
    Theme,
    legend_below,
    new_figure,
    ring,
    sequence,
    styled,
)
from patcher.report.pictures.wording import shown

_MOST_LINES = 7


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
                low, high = column(line, "effect_low"), column(line, "effect_high")
                axes.fill_between(layers, low, high, color=colour, alpha=0.22, linewidth=0, gid="interval")
            axes.plot(
                layers,
                column(line, "effect"),
                color=colour,
                marker=MARKERS[place % len(MARKERS)],
                linestyle="-" if chosen else DASHES[place % len(DASHES)],
                linewidth=3.2 if chosen else 1.4,
                markersize=7 if chosen else 5,
                zorder=3 if chosen else 2,
                label=shown(coefficient, digits=4),
                gid=f"effect_{coefficient:g}",
            )
        recommended = row_at(sweep, recommended_cell(sweep))
        if recommended is not None and has_numbers([recommended], "effect"):
            ring(axes, or_nan(cell.layer), or_nan(recommended.get("effect")), theme)
        label_layers(axes, layers_of(rows))
        effect_axis(axes, sweep)
        axes.set_title("Effect by layer, one line a coefficient")
        legend_below(picture, axes, 4, title="coefficient")
        return picture
