"""What was measured on the pairs kept for the report: the recommended cell beside its controls, with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from patcher.report.pictures.axes import signed_axis
from patcher.report.pictures.reading import measure_name, or_nan, rows_of
from patcher.report.pictures.style import LIGHT, Theme, new_figure, styled
from patcher.report.pictures.text import printable

_MOST = 24
_LOOKS = {
    "recommended": ("o", "more", 9),
    "chosen": ("o", "ink", 8),
    "negative": ("s", "less", 7),
    "random": ("x", "random", 6),
    "prompting": ("^", "third", 8),
    "prompting_and_steering": ("v", "third", 8),
}


def figure(sweep: Mapping[str, Any], theme: Theme = LIGHT) -> Figure | None:
    """A row each, effects across; None where there is nothing beside the base."""
    rows = [row for row in rows_of(sweep, "report") if row["kind"] != "base" and row["effect"] is not None][:_MOST]
    if not rows:
        return None
    with styled(theme):
        picture = new_figure(0.3 * len(rows) + 1.3)
        axes = picture.subplots()
        axes.axvline(0, color=theme.quiet, linewidth=1)
        for place, row in enumerate(rows):
            kind = row["kind"]
            marker, colour, size = _LOOKS.get(kind, ("D", "ink", 7))
            ink = getattr(theme, colour)
            ends = [or_nan(row.get("low")), or_nan(row.get("high"))]
            thick = 3.0 if kind == "recommended" else 1.6
            axes.plot(ends, [place, place], color=ink, linewidth=thick, gid=f"interval_{place}")
            axes.plot(
                [row["effect"]],
                [place],
                marker=marker,
                markersize=size,
                markeredgewidth=2 if marker == "x" else 0,
                color=ink,
                linestyle="",
                gid=f"{kind}_{place}",
            )
        axes.set_yticks(range(len(rows)), [printable(row.get("name", ""), longest=32) for row in rows])
        for label, row in zip(axes.get_yticklabels(), rows, strict=True):
            if row.get("kind") == "recommended":
                label.set_fontweight("bold")
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        signed_axis(axes, "x")
        picture.supxlabel(printable(f"change of {measure_name(sweep)}, 95 % interval", longest=60), fontsize=10.5)
        axes.set_title("On the pairs kept for the report", x=0, loc="left")
        return picture
