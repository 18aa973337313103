"""Axes of layers, coefficients and damage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Colormap, Normalize
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, NullLocator, SymmetricalLogLocator

from patcher.report.pictures.reading import evenly, measure_name, or_nan
from patcher.report.pictures.style import DASHES, SMALL, Theme, ink_on
from patcher.report.pictures.text import printable
from patcher.report.pictures.wording import shown

MOST_TILES = 13
"""Columns of a heat map that have a tick and may have numbers."""

_WIDE = 100
_MOST_TICKS = 12
_GAP = 0.09
"""Of the axis, between the ticks of two coefficients."""


def tick(axis: Axis, text: Callable[[float], str], *, most: int = 6) -> None:
    """Ticks at round numbers, at most ``most`` steps, with ``text`` of each."""
    axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(lambda value, _: text(value))


def label_layers(axes: Axes, layers: Sequence[int]) -> None:
    """Ticks at measured layers, all of them where they fit."""
    axes.set_xticks(evenly(layers, _MOST_TICKS))
    axes.set_xlabel("layer")
    _room(axes, layers)


def label_coefficients(axes: Axes, coefficients: Sequence[float]) -> None:
    """Ticks at measured coefficients; a logarithmic axis where all are positive and span a factor of 16 or more."""
    if len(coefficients) > 2 and coefficients[0] > 0 and coefficients[-1] / coefficients[0] >= 16:
        axes.set_xscale("log", base=2)
    log = axes.get_xscale() == "log"
    ticks = evenly(coefficients, 9) if log else _apart(coefficients)
    axes.set_xticks(ticks, [shown(tick, digits=4) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("coefficient")
    if not log:
        _room(axes, coefficients)


def _apart(values: Sequence[float]) -> list[float]:
    """Those of some ascending values whose labels do not run into one another, the ends among them."""
    if len(values) < 3:
        return list(values)
    gap = _GAP * (values[-1] - values[0])
    kept = [values[-1]]
    for value in [values[0], *sorted(values[1:-1], key=abs, reverse=True)]:
        if all(abs(value - other) >= gap for other in kept):
            kept.append(value)
    return sorted(kept)


def _room(axes: Axes, values: Sequence[float]) -> None:
    span = values[-1] - values[0] if len(values) > 1 else 0
    axes.set_xlim(values[0] - (0.04 * span or 0.5), values[-1] + (0.04 * span or 0.5))


def scale_damage(axes: Axes, which: str, values: Sequence[float], guard: float | None, theme: Theme) -> None:
    """A damage axis from 0: linear, or symmetric-logarithmic where positive values span more than a factor of 100.

    The line of the guard goes across it.
    """
    axis = axes.xaxis if which == "x" else axes.yaxis
    positive = [value for value in (*values, *([] if guard is None else [guard])) if value > 0]
    most = max(positive, default=1.0)
    wide = bool(positive) and most / min(positive) > _WIDE
    if wide:
        floor = 10.0 ** math.floor(math.log10(min(positive)))
        (axes.set_xscale if which == "x" else axes.set_yscale)("symlog", linthresh=floor, linscale=0.4)
        axis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=floor))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(lambda value, _: shown(value))
    else:
        tick(axis, partial(shown, digits=4), most=5)
    axes.set(**{f"{which}lim": (0, most * (1.6 if wide else 1.08))})
    if guard is None:
        return
    line = {"color": theme.ink, "linewidth": 1.2, "linestyle": DASHES[3], "gid": "guard"}
    beside: dict[str, Any] = {"text": f"guard {shown(guard)}", "textcoords": "offset points", "fontsize": SMALL}
    if which == "x":
        axes.axvline(guard, **line)
        axes.annotate(
            xy=(guard, 0), xycoords=("data", "axes fraction"), xytext=(-4, 4), rotation=90, ha="right", **beside
        )
    else:
        axes.axhline(guard, **line)
        axes.annotate(xy=(0, guard), xycoords=("axes fraction", "data"), xytext=(5, 3), **beside)


def tiles(
    axes: Axes,
    values: Sequence[Sequence[float | None]],
    across: Sequence[int],
    up: Sequence[float],
    colours: Colormap,
    scale: Normalize,
    text: Callable[[float | None], str],
    theme: Theme,
    *,
    most_rows: int = MOST_TILES,
) -> tuple[AxesImage, bool]:
    """A heat map, with its numbers where there is room for them.

    Args:
        values: (up, across); what is None stays empty.
        across: the layers.
        up: what the rows stand for.
        text: of a value.
        most_rows: so many rows have a tick and may have numbers.

    Returns:
        The image, and whether it shows the numbers.
    """
    drawn = np.ma.masked_invalid(np.array([[or_nan(value) for value in row] for row in values], dtype=float))
    image = axes.imshow(drawn, cmap=colours, norm=scale, aspect="auto", origin="lower", interpolation="nearest")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    for axis, places, most in ((axes.xaxis, across, MOST_TILES), (axes.yaxis, up, most_rows)):
        ticks = evenly(places, most)
        axis.set_ticks([places.index(tick) for tick in ticks], [shown(tick, digits=4) for tick in ticks])
    axes.tick_params(length=0)
    numbered = len(across) <= MOST_TILES and len(up) <= most_rows
    for y, row in enumerate(values if numbered else []):
        for x, value in enumerate(row):
            ink = theme.quiet if value is None else ink_on(colours(scale(value)), theme)
            axes.text(x, y, text(value), ha="center", va="center", fontsize=SMALL, color=ink)
    return image, numbered


def colour_bar(image: Any, axes: Axes, **options: Any) -> None:
    """The key of an image's colours."""
    figure: Any = axes.figure
    figure.colorbar(image, ax=axes, pad=0.015, fraction=0.05, **options).outline.set_visible(False)


def effect_axis(axes: Axes, sweep: Mapping[str, Any], theme: Theme) -> None:
    """The upright axis of the sweep's measure, and its line of no effect."""
    axes.axhline(0, color=theme.quiet, linewidth=1)
    signed_axis(axes)
    axes.set_ylabel(printable(f"change of\n{measure_name(sweep)}", longest=60))


def signed_axis(axes: Axes, which: str = "y") -> None:
    """Tick labels with their sign: these are changes."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    tick(axis, lambda value: shown(value, signed=True) if abs(value) > 1e-12 else "0")
