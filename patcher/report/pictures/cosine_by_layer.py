"""Cosine similarity between the vectors of all layers: layers that share a direction form a block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from patcher.report.pictures.reading import evenly, number, part_of
from patcher.report.pictures.style import LIGHT, SMALL, Theme, diverging, ink_on, new_figure, styled
from patcher.report.pictures.wording import fixed

_MOST_NUMBERED = 13


def figure(sweep: Mapping[str, Any], theme: Theme = LIGHT) -> Figure | None:
    """A square heat map from -1 to 1; None for fewer than two layers."""
    geometry = part_of(sweep, "geometry")
    layers = [int(layer) for layer in geometry.get("layers") or []]
    rows = [[number(value) for value in row] for row in geometry.get("cosine") or []]
    if len(layers) < 2 or len(rows) != len(layers) or any(len(row) != len(layers) for row in rows):
        return None
    values = np.array([[np.nan if value is None else value for value in row] for row in rows], dtype=float)
    with styled(theme):
        numbered = len(layers) <= _MOST_NUMBERED
        picture = new_figure(5.3)
        axes = picture.subplots()
        colours, scale = diverging(theme), Normalize(-1, 1)
        image = axes.imshow(
            np.ma.masked_invalid(values),
            cmap=colours,
            norm=scale,
            aspect="auto",
            origin="lower",
            interpolation="nearest",
        )
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        ticks = evenly(layers, _MOST_NUMBERED)
        axes.set_xticks([layers.index(layer) for layer in ticks], [str(layer) for layer in ticks])
        axes.set_yticks([layers.index(layer) for layer in ticks], [str(layer) for layer in ticks])
        axes.tick_params(length=0)
        if numbered:
            for y, row in enumerate(rows):
                for x, value in enumerate(row):
                    ink = theme.quiet if value is None else ink_on(colours(scale(value)), theme)
                    text = fixed(value, 2, signed=False, short=True)
                    axes.text(x, y, text, ha="center", va="center", fontsize=SMALL, color=ink)
        bar = picture.colorbar(image, ax=axes, pad=0.015, fraction=0.05, label="cosine similarity")
        bar.outline.set_visible(False)
        axes.set_xlabel("layer")
        axes.set_ylabel("layer")
        axes.set_title("Cosine similarity of the vectors of two layers")
        return picture
