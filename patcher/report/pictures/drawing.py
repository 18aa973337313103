"""All pictures of a sweep, as files."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from patcher.errors import MissingExtraError
from patcher.report.pictures.captions import TITLES

PICTURES = tuple(TITLES)
"""Names of all pictures, in the order of the report."""


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def require_plots(instead: str = "") -> None:
    """Refuse to draw without matplotlib.

    Args:
        instead: what to do without it.

    Raises:
        MissingExtraError: an InputError with the code ``missing_extra`` that names the extra ``plots``.
    """
    if not can_draw():
        raise MissingExtraError("matplotlib", "plots", "drawing pictures", instead=instead)


def dark_of(picture: Path) -> Path:
    """Where the same picture on dark paper lies."""
    return picture.with_name(f"{picture.stem}_dark{picture.suffix}")


def draw_all(
    sweep: Mapping[str, Any], folder: Path, *, names: Sequence[str] = PICTURES, dark: bool = True
) -> dict[str, Path]:
    """Draw every picture whose data is there.

    Args:
        sweep: the content of sweep.json, or the parts of it that there are.
        folder: made where it is missing; ``NAME.png`` and, on dark paper, ``NAME_dark.png`` are written, 1200 pixels
            wide, legible at 600.
        names: of :data:`PICTURES`.
        dark: whether those on dark paper are drawn as well.

    Returns:
        The light file of each picture drawn, by name, in the order of ``names``; :func:`dark_of` names its dark one.

    Raises:
        MissingExtraError: without matplotlib.
    """
    require_plots()
    from patcher.report.pictures.style import DARK, LIGHT, save

    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, Path] = {}
    with _quiet():
        for name in names:
            draw = importlib.import_module(f"patcher.report.pictures.{name}").figure
            path = folder / f"{name}.png"
            for theme, target in ((LIGHT, path), (DARK, dark_of(path)))[: 1 + dark]:
                picture = draw(sweep, theme)
                if picture is None:
                    target.unlink(missing_ok=True)
                    continue
                save(picture, target, theme)
                drawn[name] = path
    return drawn


@contextmanager
def _quiet() -> Iterator[None]:
    """Fonts that are not installed are not the user's concern; nothing else is hushed."""
    logger = logging.getLogger("matplotlib.font_manager")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            yield
    finally:
        logger.setLevel(before)
