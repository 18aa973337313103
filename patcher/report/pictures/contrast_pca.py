"""Activations of the contrast pairs on their first two principal components, a panel a layer, and their separation.

As Rimsky et al. 2024 (https://arxiv.org/abs/2312.06681), figure 2: a layer where both sides fall apart represents the
behaviour.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from patcher.report.pictures.axes import label_layers
from patcher.report.pictures.reading import evenly, part_of, recommended_cell
from patcher.report.pictures.style import LIGHT, SMALL, Theme, new_figure, ring, styled, title_over
from patcher.report.pictures.wording import fixed

_COLUMNS = 4
_MOST_PANELS = 12
_MOST_POINTS = 400
_KEY = "d′ separation; below each panel the variance that PC 1 + PC 2 explain"


def figure(sweep: Mapping[str, Any], theme: Theme = LIGHT) -> Figure | None:
    """Up to 12 panels, the recommended layer's among them, and a line of the separation; None without activations."""
    geometry = part_of(sweep, "geometry")
    clouds = {int(layer): cloud for layer, cloud in part_of(geometry, "pca").items()}
    if not clouds:
        return None
    recommended = recommended_cell(sweep)
    layers = evenly(sorted(clouds), _MOST_PANELS, keep=None if recommended is None else recommended.layer)
    pairs = zip(geometry["layers"], geometry["separation"], strict=True)
    separation = {layer: value for layer, value in sorted(pairs) if value is not None}
    with styled(theme):
        columns = min(_COLUMNS, len(layers))
        rows = -(-len(layers) // columns)
        lined = len(separation) > 1
        panel = 1.42 if columns == _COLUMNS else 2.4
        heights = [panel] * rows + ([1.75] if lined else [])
        picture = new_figure(sum(heights) + 0.85)
        grid = picture.add_gridspec(len(heights), columns, height_ratios=heights)
        drawn = []
        for place, layer in enumerate(layers):
            axes = picture.add_subplot(grid[place // columns, place % columns])
            _panel(axes, layer, clouds[layer], separation.get(layer), theme)
            if recommended is not None and recommended.layer == layer:
                axes.spines[:].set(color=theme.mark, linewidth=2.2)
            drawn.append(axes)
        if lined:
            _line(picture.add_subplot(grid[rows, :]), separation, recommended, theme)
        key = drawn[0].get_legend_handles_labels()
        picture.legend(*key, loc="outside lower center", ncols=2, markerscale=2, title=_KEY)
        title_over(picture, "Contrast activations on two principal components")
        return picture


def _panel(axes: Axes, layer: int, cloud: Mapping[str, Any], separation: float | None, theme: Theme) -> None:
    for side, marker, colour in (("negative", "^", theme.less), ("positive", "o", theme.more)):
        points = np.array(evenly(cloud[side], _MOST_POINTS))
        axes.scatter(
            points[:, 0],
            points[:, 1],
            s=9,
            marker=marker,
            color=colour,
            alpha=0.75,
            linewidths=0,
            label=side,
            gid=f"{side}_{layer}",
        )
    apart = "" if separation is None else f"  d′ {fixed(separation, 1, signed=False)}"
    axes.set_title(f"layer {layer}{apart}", fontsize=SMALL + 0.5, fontweight="normal", pad=4)
    known = [f"{100 * part:.0f} %" for part in cloud["explained"] if part is not None]
    axes.set_xlabel(" + ".join(known), fontsize=SMALL, labelpad=2)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color=theme.line)


def _line(axes: Axes, separation: Mapping[int, float], recommended: Any, theme: Theme) -> None:
    axes.plot(list(separation), list(separation.values()), color=theme.third, marker="o", gid="separation")
    label_layers(axes, list(separation))
    axes.set_ylim(bottom=min(0.0, *separation.values()))
    axes.set_ylabel("separation d′")
    if recommended is not None and recommended.layer in separation:
        ring(axes, recommended.layer, separation[recommended.layer], theme, size=14)
