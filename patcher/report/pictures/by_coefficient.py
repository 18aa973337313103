"""Effect and damage against the coefficient at one layer, beside random vectors of equal norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from patcher.report.pictures.axes import effect_axis, label_coefficients, scale_damage
from patcher.report.pictures.reading import (
    along,
    cells_along,
    column,
    guard_limit,
    has_numbers,
    recommended_cell,
    rows_of,
    shown_cell,
)
from patcher.report.pictures.style import DASHES, LIGHT, SMALL, Theme, new_figure, styled, upright


def figure(sweep: Mapping[str, Any], theme: Theme = LIGHT) -> Figure | None:
    """Two panels over one axis of coefficients, or one where no damage was measured; None without effects."""
    cell = shown_cell(sweep)
    if cell is None:
        return None
    rows, randoms = (cells_along(rows_of(sweep, key), "coefficient", cell) for key in ("grid", "random_grid"))
    if not has_numbers(rows, "effect"):
        return None
    with styled(theme):
        damaged = has_numbers(rows, "damage")
        picture = new_figure(5.0 if damaged else 3.2)
        heights = [3, 2] if damaged else [3]
        panels = picture.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        _effects(panels[0], sweep, rows, theme)
        _randoms(panels[0], randoms, "effect", theme)
        if damaged:
            coefficients, damages = column(rows, "coefficient"), column(rows, "damage")
            panels[1].plot(coefficients, damages, color=theme.less, marker="s", gid="damage")
            _randoms(panels[1], randoms, "damage", theme)
            scale_damage(panels[1], "y", damages + column(randoms, "damage"), guard_limit(sweep), theme)
            panels[1].set_ylabel("KL divergence\n(nats a token)")
        label_coefficients(panels[-1], along(rows, "coefficient"))
        if recommended_cell(sweep) == cell:
            upright(panels, cell.coefficient, theme)
            _name(panels[0], cell.coefficient)
        place = "" if cell.layer is None else f" at layer {cell.layer}"
        panels[0].set_title(f"Effect{' and damage' if damaged else ''} by coefficient{place}")
        panels[0].legend(loc="best", handlelength=2.8)
        return picture


def _effects(axes: Axes, sweep: Mapping[str, Any], rows: list[Mapping[str, Any]], theme: Theme) -> None:
    effect_axis(axes, sweep, theme)
    coefficients, low, high = (column(rows, key) for key in ("coefficient", "effect_low", "effect_high"))
    label = "95 % interval" if has_numbers(rows, "effect_low") else "_"
    axes.fill_between(coefficients, low, high, color=theme.more, alpha=0.2, linewidth=0, gid="interval", label=label)
    if len(rows) == 1:
        axes.vlines(coefficients, low, high, color=theme.more)
    axes.plot(coefficients, column(rows, "effect"), color=theme.more, marker="o", label="steering vector", gid="effect")


def _randoms(axes: Axes, rows: list[Mapping[str, Any]], key: str, theme: Theme) -> None:
    if has_numbers(rows, key):
        axes.plot(
            column(rows, "coefficient"),
            column(rows, key),
            color=theme.random,
            marker="x",
            linestyle=DASHES[1],
            label="random, equal norm",
            gid=f"random_{key}",
        )


def _name(axes: Axes, coefficient: float) -> None:
    axes.annotate(
        "recommended",
        (coefficient, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-4, -2),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=SMALL,
    )
