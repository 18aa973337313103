"""Effect against damage: every cell, the front that no cell beats in both, the random control."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from patcher.report.pictures.axes import colour_bar, effect_axis, scale_damage
from patcher.report.pictures.reading import guard_limit, number, place_of, recommended_cell, rows_of
from patcher.report.pictures.style import LIGHT, Theme, legend_below, new_figure, ring, sequence, styled


def figure(sweep: Mapping[str, Any], theme: Theme = LIGHT) -> Figure | None:
    """Damage across, effect up, the layer in colour; None for fewer than two cells that have both."""
    cells = _points(rows_of(sweep, "grid"))
    if len(cells) < 2:
        return None
    randoms = _points(rows_of(sweep, "random_grid"))
    with styled(theme):
        picture = new_figure(4.4)
        axes = picture.subplots()
        axes.axhline(0, color=theme.quiet, linewidth=1)
        layers = [number(row.get("layer")) for _, _, row in cells]
        by_layer = len({layer for layer in layers if layer is not None}) > 1
        colours: dict[str, Any] = {"color": theme.more}
        if by_layer:
            known = [0.0 if layer is None else layer for layer in layers]
            colours = {
                "c": known,
                "cmap": ListedColormap(sequence(theme, 256)),
                "norm": Normalize(min(known), max(known)),
            }
        dots = axes.scatter(
            [damage for damage, _, _ in cells],
            [effect for _, effect, _ in cells],
            s=34,
            linewidths=0,
            label="cells",
            gid="cells",
            zorder=2,
            **colours,
        )
        if by_layer:
            colour_bar(dots, axes, label="layer", ticks=MaxNLocator(8, integer=True))
        if randoms:
            axes.scatter(
                [damage for damage, _, _ in randoms],
                [effect for _, effect, _ in randoms],
                marker="x",
                s=40,
                color=theme.random,
                label="random, equal norm",
                gid="random",
            )
        _front(axes, sweep, cells, theme)
        scale_damage(axes, "x", [damage for damage, _, _ in cells + randoms], guard_limit(sweep), theme)
        effect_axis(axes, sweep)
        axes.set_xlabel("damage: KL divergence on neutral text (nats a token)")
        axes.set_title("Effect against damage")
        legend_below(picture, axes, 2)
        return picture


def _points(rows: list[Mapping[str, Any]]) -> list[tuple[float, float, Mapping[str, Any]]]:
    points = []
    for row in rows:
        damage, effect = number(row.get("damage")), number(row.get("effect"))
        if damage is not None and effect is not None:
            points.append((damage, effect, row))
    return points


def _front(
    axes: Any, sweep: Mapping[str, Any], cells: list[tuple[float, float, Mapping[str, Any]]], theme: Theme
) -> None:
    named = set(map(place_of, rows_of(sweep, "pareto")))
    front = sorted((damage, effect) for damage, effect, row in cells if place_of(row) in named)
    if front:
        axes.plot(
            [damage for damage, _ in front],
            [effect for _, effect in front],
            color=theme.less,
            linewidth=1.8,
            drawstyle="steps-post",
            label="Pareto front",
            gid="front",
            zorder=1.5,
        )
    cell = recommended_cell(sweep)
    for damage, effect, row in cells:
        if cell is not None and place_of(row) == cell:
            ring(axes, damage, effect, theme)
