"""The tokens whose probability after a prompt changes most: bars of the base and of the steered model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from patcher.report.pictures.reading import number, rows_of
from patcher.report.pictures.style import LIGHT, SMALL, Theme, legend_below, new_figure, styled, title_over
from patcher.report.pictures.text import printable
from patcher.report.pictures.wording import shortened, shown, visible_token

_MOST_PROMPTS = 2
_MOST_TOKENS = 10
_ROW = 0.34


def figure(sweep: Mapping[str, Any], theme: Theme = LIGHT) -> Figure | None:
    """Two prompts at most, ten tokens of each, by the ratio of probabilities; None without any."""
    found = [(str(entry.get("prompt", "")), _strongest(entry)) for entry in rows_of(sweep, "shifted")]
    found = [entry for entry in found if entry[1]][:_MOST_PROMPTS]
    if not found:
        return None
    with styled(theme):
        heights = [_ROW * len(tokens) + 0.3 for _, tokens in found]
        picture = new_figure(sum(heights) + 0.55 * len(found) + 0.8)
        panels = picture.subplots(len(found), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (prompt, tokens) in zip(panels, found, strict=True):
            _bars(axes, tokens, theme)
            quoted = printable(shortened(" ".join(prompt.split()), 40), longest=44)
            axes.set_title(f"after “{quoted}”", fontsize=10.5, fontweight="normal")
        panels[-1].set_xlabel("probability of the next token")
        title_over(picture, "Most shifted tokens")
        legend_below(picture, panels[0], 2)
        return picture


def _strongest(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Tokens with the largest ratios either way, from the most raised to the most lowered."""
    known = [
        token
        for token in rows_of(entry, "tokens")
        if None not in (number(token.get("base")), number(token.get("steered")), number(token.get("log_ratio")))
    ]
    largest = sorted(known, key=lambda token: -abs(token["log_ratio"]))[:_MOST_TOKENS]
    return sorted(largest, key=lambda token: -token["log_ratio"])


def _bars(axes: Axes, tokens: list[Mapping[str, Any]], theme: Theme) -> None:
    places = range(len(tokens))
    base = [float(token["base"]) for token in tokens]
    steered = [float(token["steered"]) for token in tokens]
    axes.barh(
        [place + 0.2 for place in places],
        base,
        height=0.36,
        facecolor=theme.paper,
        edgecolor=theme.quiet,
        hatch="////",
        linewidth=1,
        label="base",
        gid="base",
    )
    axes.barh([place - 0.2 for place in places], steered, height=0.36, color=theme.more, label="steered", gid="steered")
    axes.set_yticks(
        list(places),
        [printable(visible_token(token.get("token"), 18), longest=24) for token in tokens],
    )
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    most = max([*base, *steered, 1e-12])
    axes.set_xlim(0, most * 1.32)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{shown(100 * value)} %"))
    for place, (before, after, token) in enumerate(zip(base, steered, tokens, strict=True)):
        axes.annotate(
            _ratio(before, after, float(token["log_ratio"])),
            (max(before, after), place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
        )


def _ratio(before: float, after: float, log_ratio: float) -> str:
    """ "×52" or "÷6"; the ratio as it was measured where the probabilities are too small to divide."""
    ratio = after / before if before > 0 and after > 0 else 2.718281828 ** max(-50.0, min(50.0, log_ratio))
    return f"×{shown(ratio, digits=2)}" if ratio >= 1 else f"÷{shown(1 / ratio, digits=2)}"
