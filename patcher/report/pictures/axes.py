"""Axes of layers, coefficients and damage."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, SymmetricalLogLocator

from patcher.report.pictures.reading import evenly
from patcher.report.pictures.wording import shown

_WIDE = 100
_MOST_TICKS = 12
_GAP = 0.09
"""Of the axis, between the ticks of two coefficients."""


def label_layers(axes: Axes, layers: Sequence[int], *, label: str = "layer") -> None:
    """Ticks at measured layers, all of them where they fit."""
    ticks = evenly(layers, _MOST_TICKS)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)
    _room(axes, layers)


def label_coefficients(axes: Axes, coefficients: Sequence[float]) -> None:
    """Ticks at measured coefficients; a logarithmic axis where all are positive and span a factor of 16 or more."""
    if len(coefficients) > 2 and coefficients[0] > 0 and coefficients[-1] / coefficients[0] >= 16:
        axes.set_xscale("log", base=2)
    log = axes.get_xscale() == "log"
    axes.xaxis.set_major_locator(FixedLocator(evenly(coefficients, 9) if log else _apart(coefficients)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, digits=4)))
    axes.set_xlabel("coefficient")
    if axes.get_xscale() == "linear":
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


def scale_damage(axes: Axes, which: str, values: Sequence[float]) -> None:
    """A damage axis from 0: linear, or symmetric-logarithmic where positive values span more than a factor of 100."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    set_scale, set_limits = (axes.set_xscale, axes.set_xlim) if which == "x" else (axes.set_yscale, axes.set_ylim)
    positive = [value for value in values if value > 0]
    most = max(positive, default=1.0)
    if positive and most / min(positive) > _WIDE:
        floor = 10.0 ** _floor_exponent(min(positive))
        set_scale("symlog", linthresh=floor, linscale=0.4)
        axis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=floor))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))
        set_limits(0, most * 1.6)
    else:
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, digits=4)))
        set_limits(0, most * 1.08)


def _floor_exponent(value: float) -> int:
    return int(f"{value:e}".split("e")[1])


def signed_axis(axes: Axes, which: str = "y") -> None:
    """Tick labels with their sign: these are changes."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, signed=True) if abs(value) > 1e-12 else "0"))
