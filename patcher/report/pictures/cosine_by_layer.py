"""Cosine similarity between the vectors of all layers: layers that share a direction form a block."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from patcher.report.pictures.axes import colour_bar, tiles
from patcher.report.pictures.reading import number, part_of
from patcher.report.pictures.style import LIGHT, Theme, diverging, new_figure, styled
from patcher.report.pictures.wording import fixed


def figure(sweep: Mapping[str, Any], theme: Theme = LIGHT) -> Figure | None:
    """A square heat map from -1 to 1; None for fewer than two layers."""
    geometry = part_of(sweep, "geometry")
    layers = [int(layer) for layer in geometry.get("layers") or []]
    rows = [[number(value) for value in row] for row in geometry.get("cosine") or []]
    if len(layers) < 2 or len(rows) != len(layers) or any(len(row) != len(layers) for row in rows):
        return None
    with styled(theme):
        picture = new_figure(5.3)
        axes = picture.subplots()
        text = functools.partial(fixed, places=2, signed=False, short=True)
        image, _ = tiles(axes, rows, layers, layers, diverging(theme), Normalize(-1, 1), text, theme)
        colour_bar(image, axes, label="cosine similarity")
        axes.set_xlabel("layer")
        axes.set_ylabel("layer")
        axes.set_title("Cosine similarity of the vectors of two layers")
        return picture
