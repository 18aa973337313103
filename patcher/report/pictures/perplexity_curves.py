"""Perplexity of on- and off-topic texts, by layer and by coefficient, relative to the base.

The experiment of Turner et al. 2023 (https://arxiv.org/abs/2308.10248), figures 3 and 4: texts about the topic become
more likely, others hardly change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from patcher.report.pictures.axes import label_coefficients, label_layers, tick
from patcher.report.pictures.reading import (
    Axis,
    along,
    cells_along,
    column,
    has_numbers,
    number,
    part_of,
    recommended_cell,
    rows_of,
    shown_cell,
)
from patcher.report.pictures.style import DASHES, LIGHT, Theme, legend_below, new_figure, styled, title_over, upright
from patcher.report.pictures.wording import shown

_TEXTS = (("on_topic", "on-topic"), ("off_topic", "off-topic"), ("perplexity", "neutral"))


def figure(sweep: Mapping[str, Any], theme: Theme = LIGHT) -> Figure | None:
    """One panel an axis that has two cells or more; None without on- or off-topic perplexities."""
    cell = shown_cell(sweep)
    grid = rows_of(sweep, "grid")
    if cell is None or not (has_numbers(grid, "on_topic") or has_numbers(grid, "off_topic")):
        return None
    axes_of: tuple[Axis, ...] = ("layer", "coefficient")
    axes_shown = [(rows, which) for which in axes_of if len(rows := cells_along(grid, which, cell)) > 1]
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
                label_layers(axes, along(rows, which))
                place = f"at coefficient {shown(cell.coefficient, digits=4)}"
            else:
                label_coefficients(axes, along(rows, which))
                place = "" if cell.layer is None else f"at layer {cell.layer}"
            axes.set_title(place, fontsize=10.5, fontweight="normal")
            if recommended_cell(sweep) is not None:
                upright([axes], getattr(cell, which), theme)
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
            column(rows, which),
            [value / base for value in column(rows, key)],
            color=colour,
            marker=marker,
            linestyle=dash,
            label=name,
            gid=key,
        )
    tick(axes.yaxis, shown)
