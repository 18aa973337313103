"""Effect against layer, a line a coefficient (as Rimsky et al. 2024, https://arxiv.org/abs/2312.06681, figure 3)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from typing import Any

from matplotlib.figure import Figure

from patcher.report.pictures.axes import effect_axis, label_layers
from patcher.report.pictures.reading import (
    along,
    cells_along,
    column,
    evenly,
    has_numbers,
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
    rows, cell = rows_of(sweep, "grid"), shown_cell(sweep)
    layers = along(rows, "layer")
    if cell is None or len(layers) < 2 or not has_numbers(rows, "effect"):
        return None
    coefficients = evenly(along(rows, "coefficient"), _MOST_LINES, keep=cell.coefficient)
    with styled(theme):
        picture = new_figure(4.1)
        axes = picture.subplots()
        effect_axis(axes, sweep, theme)
        colours = sequence(theme, len(coefficients))
        for coefficient, colour, marker, dash in zip(coefficients, colours, MARKERS, cycle(DASHES), strict=False):
            line = cells_along(rows, "layer", cell._replace(coefficient=coefficient))
            places = column(line, "layer")
            chosen = coefficient == cell.coefficient
            if chosen and has_numbers(line, "effect_low"):
                low, high = column(line, "effect_low"), column(line, "effect_high")
                axes.fill_between(places, low, high, color=colour, alpha=0.22, linewidth=0, gid="interval")
            axes.plot(
                places,
                column(line, "effect"),
                color=colour,
                marker=marker,
                linestyle="-" if chosen else dash,
                linewidth=3.2 if chosen else 1.4,
                markersize=7 if chosen else 5,
                zorder=3 if chosen else 2,
                label=shown(coefficient, digits=4),
                gid=f"effect_{coefficient:g}",
            )
        recommended = row_at(sweep, recommended_cell(sweep))
        if recommended is not None and has_numbers([recommended], "effect"):
            ring(axes, or_nan(cell.layer), or_nan(recommended.get("effect")), theme)
        label_layers(axes, layers)
        axes.set_title("Effect by layer, one line a coefficient")
        legend_below(picture, axes, 4, title="coefficient")
        return picture
