"""The whole grid: effect and damage of every cell, the recommended one framed, those outside the guard hatched."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from patcher.report.pictures.axes import colour_bar, tiles
from patcher.report.pictures.reading import (
    Grid,
    GridPlace,
    grid_of,
    measure_name,
    outside_guard,
    recommended_cell,
)
from patcher.report.pictures.style import (
    LIGHT,
    Theme,
    around_nought,
    diverging,
    new_figure,
    sequence,
    styled,
)
from patcher.report.pictures.text import printable
from patcher.report.pictures.wording import fixed, shown

_MOST_ROWS = 14
_HATCH = "////"


def figure(sweep: Mapping[str, Any], theme: Theme = LIGHT) -> Figure | None:
    """Layers across, coefficients up; None for fewer than two cells with an effect and a layer."""
    effect, damage = grid_of(sweep, "effect"), grid_of(sweep, "damage")
    if len(effect.numbers()) < 2:
        return None
    with styled(theme):
        grids = [effect, damage] if damage.numbers() else [effect]
        height = min(max(0.29 * len(effect.coefficients), 0.75), 3.2) + 0.85
        picture = new_figure(height * len(grids) + 0.75)
        panels = picture.subplots(len(grids), 1, squeeze=False)[:, 0]
        _cells(panels[0], effect, diverging(theme), around_nought(effect.numbers()), _effect_text, theme)
        panels[0].set_title(printable(f"Effect: change of {measure_name(sweep)}", longest=52))
        if len(grids) > 1:
            colours = ListedColormap(sequence(theme, 256))
            _cells(panels[1], damage, colours, _damage_scale(damage), _damage_text, theme)
            panels[1].set_title("Damage: KL divergence on neutral text (nats a token)")
        recommended = recommended_cell(sweep)
        outside = outside_guard(sweep)
        for axes in panels:
            _frame(axes, effect, recommended, theme)
            _hatch(axes, effect, outside, theme)
            axes.set_ylabel("coefficient")
        panels[-1].set_xlabel("layer")
        _legend(picture, recommended in _places(effect), bool(outside), theme)
        return picture


def _places(grid: Grid) -> list[GridPlace | None]:
    return [GridPlace(layer, coefficient) for layer in grid.layers for coefficient in grid.coefficients]


def _damage_scale(grid: Grid) -> Normalize:
    positive = [value for value in grid.numbers() if value > 0]
    if positive and max(positive) / min(positive) > 100:
        return LogNorm(min(positive), max(positive), clip=True)
    return Normalize(0, max(positive, default=1.0))


_effect_text = functools.partial(fixed, places=2, short=True)
_damage_text = functools.partial(shown, digits=2, short=True, padded=True)


def _cells(
    axes: Axes, grid: Grid, colours: Colormap, scale: Normalize, text: Callable[[float], str], theme: Theme
) -> None:
    image, numbered = tiles(
        axes, grid.values, grid.layers, grid.coefficients, colours, scale, text, theme, most_rows=_MOST_ROWS
    )
    if not numbered:
        colour_bar(image, axes)


def _frame(axes: Axes, grid: Grid, cell: GridPlace | None, theme: Theme) -> None:
    if cell is None or cell.layer not in grid.layers or cell.coefficient not in grid.coefficients:
        return
    x, y = grid.layers.index(cell.layer), grid.coefficients.index(cell.coefficient)
    for colour, width in ((theme.paper, 5.0), (theme.mark, 2.4)):
        axes.add_patch(
            Rectangle(
                (x - 0.5, y - 0.5),
                1,
                1,
                fill=False,
                edgecolor=colour,
                linewidth=width,
                clip_on=False,
                zorder=4,
                gid="recommended",
            )
        )


def _hatch(axes: Axes, grid: Grid, outside: list[GridPlace], theme: Theme) -> None:
    for layer, coefficient in outside:
        if layer in grid.layers and coefficient in grid.coefficients:
            x, y = grid.layers.index(layer), grid.coefficients.index(coefficient)
            axes.add_patch(
                Rectangle(
                    (x - 0.5, y - 0.5),
                    1,
                    1,
                    fill=False,
                    hatch=_HATCH,
                    edgecolor=theme.quiet,
                    linewidth=0,
                    alpha=0.55,
                    gid="outside",
                )
            )


def _legend(picture: Figure, framed: bool, hatched: bool, theme: Theme) -> None:
    handles = []
    if framed:
        handles.append(Patch(fill=False, edgecolor=theme.mark, linewidth=2.4, label="recommended"))
    if hatched:
        handles.append(Patch(fill=False, edgecolor=theme.quiet, hatch=_HATCH, linewidth=0, label="exceeds the guard"))
    if handles:
        picture.legend(handles=handles, loc="outside lower center", ncols=2)
