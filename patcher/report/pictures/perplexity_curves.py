"""Perplexity of on- and off-topic texts, by layer and by coefficient, relative to the base.

The experiment of Turner et al. 2023 (https://arxiv.org/abs/2308.10248), figures 3 and 4: texts about the topic become
more likely, others hardly change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from patcher.report.pictures.axes import label_coefficients, label_layers
from patcher.report.pictures.reading import (
    cells_along,
    coefficients_of,
    column,
    has_numbers,
    layers_of,
    number,
    part_of,
    recommended_cell,
    rows_of,
    shown_cell,
)
from patcher.report.pictures.style import DASHES, LIGHT, Theme, legend_below, new_figure, styled, title_over
from patcher.report.pictures.wording import shown

_TEXTS = (("on_topic", "on-topic"), ("off_topic", "off-topic"), ("perplexity", "neutral"))


def figure(sweep: Mapping[str, Any], theme: Theme = LIGHT) -> Figure | None:
    """One panel an axis that has two cells or more; None without on- or off-topic perplexities."""
    cell = shown_cell(sweep)
    grid = rows_of(sweep, "grid")
    if cell is None or not (has_numbers(grid, "on_topic") or has_numbers(grid, "off_topic")):
        return None
    layers = cells_along(grid, coefficient=cell.coefficient)
    coefficients = cells_along(grid, layer=cell.layer)
    axes_shown = [(rows, which) for rows, which in ((layers, "layer"), (coefficients, "coefficient")) if len(rows) > 1]
    if not axes_shown:
        return None
    baseline = part_of(sweep, "baseline")
    bases = {key: number(baseline.get(key)) for key, _ in _TEXTS}
    relative = all(bases[key] for key, _ in _TEXTS if has_numbers(grid, key))
    with styled(theme):
        picture = new_figure(3.7)
        panels = picture.subplots(1, len(axes_shown), sharey=True, squeeze=False)[0]
        for axes, (rows, which) in zip(panels, axes_shown, strict=True):
            _lines(axes, rows, which, bases if relative else {}, theme)
            if which == "layer":
                label_layers(axes, layers_of(rows))
                axes.set_title(
                    f"at coefficient {shown(cell.coefficient, digits=4)}", fontsize=10.5, fontweight="normal"
                )
            else:
                label_coefficients(axes, coefficients_of(rows))
                place = "" if cell.layer is None else f"at layer {cell.layer}"
                axes.set_title(place, fontsize=10.5, fontweight="normal")
            at = cell.layer if which == "layer" else cell.coefficient
            if recommended_cell(sweep) is not None and at is not None:
                axes.axvline(at, color=theme.mark, linewidth=1.2, linestyle=DASHES[2], gid="recommended")
        panels[0].set_ylabel("perplexity, steered / base" if relative else "perplexity")
        title_over(picture, "Perplexity on and off the topic")
        legend_below(picture, panels[0], 3)
        return picture


def _lines(
    axes: Axes, rows: list[Mapping[str, Any]], which: str, bases: Mapping[str, float | None], theme: Theme
) -> None:
    if bases:
        axes.axhline(1, color=theme.quiet, linewidth=1, gid="base")
    looks = zip(_TEXTS, (theme.more, theme.less, theme.random), ("o", "s", "x"), DASHES, strict=False)
    for (key, name), colour, marker, dash in looks:
        if not has_numbers(rows, key):
            continue
        base = bases.get(key) or 1.0
        axes.plot(
            [float(row[which]) for row in rows],
            [value / base for value in column(rows, key)],
            color=colour,
            marker=marker,
            linestyle=dash,
            label=name,
            gid=key,
        )
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))
