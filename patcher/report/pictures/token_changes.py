"""A text in which each token is coloured by how much more or less likely the steered model finds it.

The picture of Turner et al. 2023 (https://arxiv.org/abs/2308.10248) with green and red; here blue and vermilion, and
solid and dotted underlines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from patcher.report.pictures.changes import STEPS, limit_of, step, texts_of, underlined
from patcher.report.pictures.style import LIGHT, WIDTH, Theme, diverging, ink_on, new_figure, styled
from patcher.report.pictures.text import printable
from patcher.report.pictures.wording import shown

_SIZE = 10.5
# DejaVu Sans Mono: every character is 1233 of 2048 units wide.
_ADVANCE = 1233 / 2048 * _SIZE / 72
_LINE = 0.235
_MARGIN = 0.12
_MOST_LINES = 14
_MOST_TEXTS = 4
# Marks that follow a word may stand past the last column, so that none begins a line.
_RESERVE = 2
_COLUMNS = int((WIDTH - 2 * _MARGIN) / _ADVANCE) - _RESERVE


def figure(sweep: Mapping[str, Any], theme: Theme = LIGHT) -> Figure | None:
    """Up to four texts, 14 lines of each; None without any."""
    texts = texts_of(sweep)
    if not texts:
        return None
    limit = limit_of(texts)
    laid = [(title, *_lines(tokens)) for title, tokens in texts[:_MOST_TEXTS]]
    lines = sum(1.6 + len(rows) + bool(left) for _, rows, left in laid)
    with styled(theme):
        height = lines * _LINE + 0.85
        picture = new_figure(height)
        picture.set_layout_engine("none")
        # One unit is one inch, so that text and its background have one measure.
        axes = picture.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
        axes.set_axis_off()
        axes.text(_MARGIN, 0.1, "Change of each token's log-probability", va="top", fontsize=11.5, fontweight="bold")
        top = 0.42
        for title, rows, left in laid:
            axes.text(_MARGIN, top + 0.5 * _LINE, printable(title, longest=60), va="center", fontweight="bold")
            top += 1.1 * _LINE
            for row in rows:
                _draw(axes, row, top, limit, theme)
                top += _LINE
            if left:
                note = f"… and {left} more tokens"
                axes.text(_MARGIN, top + 0.5 * _LINE, note, va="center", fontsize=9, color=theme.quiet)
                top += _LINE
            top += 0.5 * _LINE
        _scale(axes, top + 0.08, limit, theme)
        return picture


_Placed = tuple[int, str, float | None]


def _lines(tokens: Sequence[tuple[str, float | None]]) -> tuple[list[list[_Placed]], int]:
    """(column, characters, change) of what stands on each line, and how many tokens are left out.

    A token that does not fit goes on the next line; one that is longer than a line is cut.
    """
    lines: list[list[_Placed]] = [[]]
    column = 0
    for index, (token, change) in enumerate(tokens):
        text = printable(token.replace("\r", ""), longest=_COLUMNS, mono=True).replace("\t", "    ")
        broken = text.endswith("\n")
        text = text.replace("\n", "↵")
        short = len(text) <= _RESERVE and not text.startswith(" ")
        if column and column + len(text.rstrip()) > _COLUMNS + (_RESERVE if short else 0):
            lines.append([])
            column = 0
        if column == 0:
            text = text.lstrip(" ") or text[:1]
        if len(lines) > _MOST_LINES:
            return lines[:_MOST_LINES], len(tokens) - index
        lines[-1].append((column, text, change))
        column += len(text)
        if broken:
            lines.append([])
            column = 0
    return (lines if lines[-1] else lines[:-1]), 0


def _colour(strength: int, theme: Theme) -> tuple[float, float, float, float]:
    return diverging(theme)(0.5 + strength / STEPS / 2)


def _draw(axes: Axes, row: Sequence[_Placed], top: float, limit: float, theme: Theme) -> None:
    for column, text, change in row:
        strength = step(change, limit)
        left = _MARGIN + column * _ADVANCE
        background = _colour(strength, theme)
        ink = ink_on(background, theme) if strength else theme.ink
        width = len(text) * _ADVANCE
        if strength:
            axes.add_patch(
                Rectangle((left, top + 0.02), width, _LINE - 0.03, facecolor=background, linewidth=0, gid="token")
            )
        axes.text(left, top + 0.46 * _LINE, text, va="center", family="monospace", fontsize=_SIZE, color=ink)
        if underlined(strength):
            blank = len(text) - len(text.lstrip(" "))
            axes.plot(
                [left + blank * _ADVANCE, left + width],
                [top + _LINE - 0.03] * 2,
                color=ink,
                linewidth=1.3,
                linestyle="-" if strength > 0 else (0, (1, 1.2)),
                solid_capstyle="butt",
                dash_capstyle="butt",
                gid="more" if strength > 0 else "less",
            )


def _scale(axes: Axes, top: float, limit: float, theme: Theme) -> None:
    cell = 0.16
    left = _MARGIN + 1.05
    axes.text(left - 0.08, top + 0.09, f"≤ {shown(-limit, digits=2)} nats", ha="right", va="center", fontsize=9.5)
    for place in range(-STEPS, STEPS + 1):
        corner = left + (place + STEPS) * cell
        axes.add_patch(Rectangle((corner, top), cell, 0.18, facecolor=_colour(place, theme), linewidth=0, gid="scale"))
    axes.add_patch(Rectangle((left, top), (2 * STEPS + 1) * cell, 0.18, fill=False, edgecolor=theme.line))
    right = left + (2 * STEPS + 1) * cell + 0.08
    axes.text(right, top + 0.09, f"≥ {shown(limit, digits=2, signed=True)} nats", va="center", fontsize=9.5)
    for x, style in ((left + 2 * cell, (0, (1, 1.2))), (left + 15 * cell, "-")):
        ink = ink_on(_colour(-STEPS if x < WIDTH / 2 else STEPS, theme), theme)
        axes.plot([x - 1.5 * cell, x + 1.5 * cell], [top + 0.14] * 2, color=ink, linewidth=1.3, linestyle=style)
