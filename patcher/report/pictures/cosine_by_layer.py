"""Cosine similarity between the vectors of all layers: layers that share a direction form a block."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from patcher.report.pictures.axes import colour_bar, tiles
from patcher.report.pictures.reading import part_of
from patcher.report.pictures.style import LIGHT, Theme, diverging, new_figure, styled
from patcher.report.pictures.wording import fixed


def figure(sweep: Mapping[str, Any], theme: Theme = LIGHT) -> Figure | None:
    """A square heat map from -1 to 1; None for fewer than two layers."""
    geometry = part_of(sweep, "geometry")
    layers = geometry.get("layers", [])
    if len(layers) < 2:
        return None
    with styled(theme):
        picture = new_figure(5.3)
        axes = picture.subplots()
        text = functools.partial(fixed, places=2, signed=False, short=True)
        image, _ = tiles(axes, geometry["cosine"], layers, layers, diverging(theme), Normalize(-1, 1), text, theme)
        colour_bar(image, axes, label="cosine similarity")
        axes.set(xlabel="layer", ylabel="layer", title="Cosine similarity of the vectors of two layers")
        return picture
