"""Effect and damage against the coefficient at one layer, beside random vectors of equal norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from patcher.report.pictures.axes import effect_axis, label_coefficients, scale_damage
from patcher.report.pictures.reading import (
    GridPlace,
    cells_along,
    coefficients_of,
    column,
    guard_limit,
    has_numbers,
    recommended_cell,
    rows_of,
    shown_cell,
)
from patcher.report.pictures.style import DASHES, LIGHT, SMALL, Theme, new_figure, styled


def figure(sweep: Mapping[str, Any], theme: Theme = LIGHT) -> Figure | None:
    """Two panels over one axis of coefficients, or one where no damage was measured; None without effects."""
    cell = shown_cell(sweep)
    if cell is None:
        return None
    rows = cells_along(rows_of(sweep, "grid"), layer=cell.layer)
    if not has_numbers(rows, "effect"):
        return None
    random_rows = cells_along(rows_of(sweep, "random_grid"), layer=cell.layer)
    with styled(theme):
        damaged = has_numbers(rows, "damage")
        picture = new_figure(5.0 if damaged else 3.2)
        panels = picture.subplots(
            2 if damaged else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 2][: 1 + damaged]
        )
        top = panels[0][0]
        _effects(top, sweep, rows, random_rows, theme)
        if damaged:
            _damages(panels[1][0], sweep, rows, random_rows, theme)
        label_coefficients(panels[-1][0], coefficients_of(rows))
        if damaged:
            top.set_xlabel("")
        _mark(panels[:, 0], sweep, cell, theme)
        place = "" if cell.layer is None else f" at layer {cell.layer}"
        top.set_title(f"Effect and damage by coefficient{place}" if damaged else f"Effect by coefficient{place}")
        top.legend(loc="best", handlelength=2.8)
        return picture


def _effects(
    axes: Axes, sweep: Mapping[str, Any], rows: list[Mapping[str, Any]], randoms: list[Mapping[str, Any]], theme: Theme
) -> None:
    coefficients = column(rows, "coefficient")
    axes.axhline(0, color=theme.quiet, linewidth=1)
    axes.fill_between(
        coefficients,
        column(rows, "effect_low"),
        column(rows, "effect_high"),
        color=theme.more,
        alpha=0.2,
        linewidth=0,
        gid="interval",
        label="95 % interval" if has_numbers(rows, "effect_low") else "_",
    )
    if len(rows) == 1:
        axes.vlines(coefficients, column(rows, "effect_low"), column(rows, "effect_high"), color=theme.more)
    axes.plot(coefficients, column(rows, "effect"), color=theme.more, marker="o", label="steering vector", gid="effect")
    if has_numbers(randoms, "effect"):
        axes.plot(
            column(randoms, "coefficient"),
            column(randoms, "effect"),
            color=theme.random,
            marker="x",
            linestyle=DASHES[1],
            label="random, equal norm",
            gid="random_effect",
        )
    effect_axis(axes, sweep)


def _damages(
    axes: Axes, sweep: Mapping[str, Any], rows: list[Mapping[str, Any]], randoms: list[Mapping[str, Any]], theme: Theme
) -> None:
    damages = column(rows, "damage")
    axes.plot(column(rows, "coefficient"), damages, color=theme.less, marker="s", gid="damage")
    beside = column(randoms, "damage") if has_numbers(randoms, "damage") else []
    if beside:
        axes.plot(
            column(randoms, "coefficient"),
            beside,
            color=theme.random,
            marker="x",
            linestyle=DASHES[1],
            gid="random_damage",
        )
    scale_damage(axes, "y", [value for value in damages + beside if value == value], guard_limit(sweep), theme)
    axes.set_ylabel("KL divergence\n(nats a token)")


def _mark(panels: Any, sweep: Mapping[str, Any], cell: GridPlace, theme: Theme) -> None:
    if recommended_cell(sweep) != cell:
        return
    for axes in panels:
        axes.axvline(cell.coefficient, color=theme.mark, linewidth=1.2, linestyle=DASHES[2], gid="recommended")
    panels[0].annotate(
        "recommended",
        (cell.coefficient, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-4, -2),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=SMALL,
    )
