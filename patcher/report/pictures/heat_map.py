"""The whole grid: effect and damage of every cell, the recommended one framed, those outside the guard hatched."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, Colormap, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from patcher.report.pictures.axes import colour_bar, tiles
from patcher.report.pictures.reading import (
    Grid,
    GridPlace,
    grid_of,
    measure_name,
    place_of,
    recommended_cell,
    rows_of,
)
from patcher.report.pictures.style import (
    LIGHT,
    Theme,
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
        _cells(
            panels[0],
            effect,
            diverging(theme),
            CenteredNorm(halfrange=max(map(abs, effect.numbers())) or 1.0),
            _effect_text,
            theme,
        )
        panels[0].set_title(printable(f"Effect: change of {measure_name(sweep)}", longest=52))
        if len(grids) > 1:
            colours = ListedColormap(sequence(theme, 256))
            _cells(panels[1], damage, colours, _damage_scale(damage), _damage_text, theme)
            panels[1].set_title("Damage: KL divergence on neutral text (nats a token)")
        recommended = recommended_cell(sweep)
        outside = [place_of(row) for row in rows_of(sweep, "grid") if row.get("within_guard") is False]
        hatched: dict[str, Any] = {"hatch": _HATCH, "edgecolor": theme.quiet, "linewidth": 0}
        framed: dict[str, Any] = {"edgecolor": theme.mark, "linewidth": 2.4}
        for axes in panels:
            for cell in outside:
                _box(axes, effect, cell, gid="outside", alpha=0.55, **hatched)
            if recommended is not None:
                for look in ({"edgecolor": theme.paper, "linewidth": 5.0}, framed):
                    _box(axes, effect, recommended, gid="recommended", clip_on=False, zorder=4, **look)
            axes.set_ylabel("coefficient")
        panels[-1].set_xlabel("layer")
        handles = []
        if recommended is not None and recommended.layer in effect.layers:
            handles.append(Patch(fill=False, label="recommended", **framed))
        if outside:
            handles.append(Patch(fill=False, label="exceeds the guard", **hatched))
        if handles:
            picture.legend(handles=handles, loc="outside lower center", ncols=2)
        return picture


def _damage_scale(grid: Grid) -> Normalize:
    positive = [value for value in grid.numbers() if value > 0]
    if positive and max(positive) / min(positive) > 100:
        return LogNorm(min(positive), max(positive), clip=True)
    return Normalize(0, max(positive, default=1.0))


_effect_text = functools.partial(fixed, places=2, short=True)
_damage_text = functools.partial(shown, digits=2, short=True, padded=True)


def _cells(
    axes: Axes, grid: Grid, colours: Colormap, scale: Normalize, text: Callable[[float | None], str], theme: Theme
) -> None:
    image, numbered = tiles(
        axes, grid.values, grid.layers, grid.coefficients, colours, scale, text, theme, most_rows=_MOST_ROWS
    )
    if not numbered:
        colour_bar(image, axes)


def _box(axes: Axes, grid: Grid, cell: GridPlace, **look: Any) -> None:
    """A box around a cell, where the grid has it."""
    if cell.layer in grid.layers and cell.coefficient in grid.coefficients:
        x, y = grid.layers.index(cell.layer), grid.coefficients.index(cell.coefficient)
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, **look))
