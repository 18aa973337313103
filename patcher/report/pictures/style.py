"""How all pictures look: colours that colour-blind people can tell, two themes, text for a card of 600 pixels.

The colours are those of Okabe and Ito (2008, https://jfly.uni-koeln.de/color/), lightened on dark paper. More
is always blue, less is always vermilion; no meaning hangs on a colour alone: lines differ in marker and dash,
cells outside the guard are hatched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray

from patcher.disk.whole_files import whole_file

WIDTH = 6.0
"""Inches; at :data:`DOTS` an inch a picture is twice as wide as a card, for dense screens."""
DOTS = 200
SMALL = 9.0
"""Points of the smallest text: 12.5 pixels on a card of 600."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1.5, 1, 1.5)), (0, (7, 2)))


@dataclass(frozen=True)
class Theme:
    """Colours of one background."""

    name: str
    paper: str
    ink: str
    quiet: str
    line: str
    more: str
    less: str
    random: str
    third: str
    mark: str
    sequence: tuple[float, float]
    """The part of viridis that stands out from the paper."""


LIGHT = Theme(
    "light",
    "#ffffff",
    "#1a1d21",
    "#555c66",
    "#d5d9de",
    "#0072b2",
    "#d55e00",
    "#767c85",
    "#009e73",
    "#111111",
    (0.0, 0.88),
)
DARK = Theme(
    "dark",
    "#15181d",
    "#e9ecf0",
    "#aab1bb",
    "#363c45",
    "#56b4e9",
    "#f08c4a",
    "#9aa1ab",
    "#2bc49a",
    "#ffffff",
    (0.22, 1.0),
)


@contextmanager
def styled(theme: Theme) -> Iterator[None]:
    """matplotlib's defaults and the theme's colours, whatever the user's matplotlibrc says."""
    settings: dict[str, Any] = {
        "font.size": 10.5,
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 10.5,
        "xtick.labelsize": 9.5,
        "ytick.labelsize": 9.5,
        "legend.fontsize": 9.5,
        "legend.frameon": False,
        "lines.linewidth": 2.0,
        "lines.markersize": 6.0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.linewidth": 0.7,
        "hatch.linewidth": 0.8,
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "text.color": theme.ink,
        "axes.titlecolor": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.edgecolor": theme.quiet,
        "xtick.color": theme.quiet,
        "ytick.color": theme.quiet,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "grid.color": theme.line,
        # What comes from a model or a recipe may hold dollar signs.
        "text.parse_math": False,
        "axes.formatter.use_mathtext": False,
    }
    with matplotlib.style.context(settings, after_reset=True):
        yield


def new_figure(height: float) -> Figure:
    """A figure that belongs to no pyplot, :data:`WIDTH` x ``height`` inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.set(w_pad=0.08, h_pad=0.07)  # type: ignore[call-arg]
    return figure


def save(figure: Figure, path: Path, theme: Theme) -> None:
    """Write a PNG."""
    with styled(theme), whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=DOTS, metadata={"Software": None})


def diverging(theme: Theme) -> Colormap:
    """From less over paper to more. Text in ink stays legible on all of it."""
    less, paper, more = (np.array(to_rgb(colour)) for colour in (theme.less, theme.paper, theme.more))
    strong = 0.82 if theme is LIGHT else 0.72
    parts = ((less, strong), (less, strong / 2), (paper, 1.0), (more, strong / 2), (more, strong))
    ends = [tuple(part * colour + (1 - part) * paper) for colour, part in parts]
    return LinearSegmentedColormap.from_list(f"less_more_{theme.name}", ends)


def sequence(theme: Theme, count: int) -> NDArray[np.float64]:
    """``count`` colours of viridis (count, 4), from the first to the last in lightness."""
    return matplotlib.colormaps["viridis"](np.linspace(*theme.sequence, count))


def ink_on(colour: tuple[float, ...], theme: Theme) -> str:
    """Nearly black or white, whichever has more contrast on ``colour`` (relative luminance of WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#111111" if luminance > 0.19 else "#ffffff"


def title_over(figure: Figure, text: str) -> None:
    """The title of a figure of several panels."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=11.5, fontweight="bold")


def ring(axes: Axes, x: float, y: float, theme: Theme, *, size: float = 15) -> None:
    """Mark a point as the recommended one."""
    axes.plot(
        [x],
        [y],
        marker="o",
        markersize=size,
        markerfacecolor="none",
        markeredgecolor=theme.mark,
        markeredgewidth=2,
        linestyle="",
        label="recommended",
        gid="recommended",
        zorder=4,
    )


def upright(panels: Iterable[Axes], place: float, theme: Theme) -> None:
    """The recommended layer or coefficient across panels."""
    for axes in panels:
        axes.axvline(place, color=theme.mark, linewidth=1.2, linestyle=DASHES[2], gid="recommended")


def legend_below(figure: Figure, axes: Axes, columns: int, **options: Any) -> None:
    """The legend of ``axes`` under the figure."""
    wide = {"handlelength": 2.6, "columnspacing": 1.4} | options
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, **wide)
