"""Effect against damage: every cell, the front that no cell beats in both, the random control."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from patcher.report.pictures.axes import colour_bar, effect_axis, scale_damage
from patcher.report.pictures.reading import along, column, guard_limit, place_of, recommended_cell, rows_of
from patcher.report.pictures.style import LIGHT, Theme, legend_below, new_figure, ring, sequence, styled


def figure(sweep: Mapping[str, Any], theme: Theme = LIGHT) -> Figure | None:
    """Damage across, effect up, the layer in colour; None for fewer than two cells that have both."""
    cells = _measured(rows_of(sweep, "grid"))
    if len(cells) < 2:
        return None
    randoms = _measured(rows_of(sweep, "random_grid"))
    with styled(theme):
        picture = new_figure(4.4)
        axes = picture.subplots()
        effect_axis(axes, sweep, theme)
        colours: dict[str, Any] = {"color": theme.more}
        by_layer = len(along(cells, "layer")) > 1
        if by_layer:
            colours = {"c": column(cells, "layer"), "cmap": ListedColormap(sequence(theme, 256))}
        dots = axes.scatter(*_points(cells), s=34, linewidths=0, label="cells", gid="cells", zorder=2, **colours)
        if by_layer:
            colour_bar(dots, axes, label="layer", ticks=MaxNLocator(8, integer=True))
        if randoms:
            axes.scatter(
                *_points(randoms), marker="x", s=40, color=theme.random, label="random, equal norm", gid="random"
            )
        named = set(map(place_of, rows_of(sweep, "pareto")))
        front = sorted(zip(*_points([row for row in cells if place_of(row) in named]), strict=True))
        if front:
            look: dict[str, Any] = {"color": theme.less, "linewidth": 1.8, "drawstyle": "steps-post", "zorder": 1.5}
            axes.plot(*zip(*front, strict=True), label="Pareto front", gid="front", **look)
        recommended = recommended_cell(sweep)
        for row in cells:
            if place_of(row) == recommended:
                ring(axes, row["damage"], row["effect"], theme)
        scale_damage(axes, "x", column([*cells, *randoms], "damage"), guard_limit(sweep), theme)
        axes.set(xlabel="damage: KL divergence on neutral text (nats a token)", title="Effect against damage")
        legend_below(picture, axes, 2)
        return picture


def _measured(rows: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["damage"] is not None and row["effect"] is not None]


def _points(rows: list[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    return column(rows, "damage"), column(rows, "effect")
