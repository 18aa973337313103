"""The optional package that draws."""

from __future__ import annotations

import importlib.util

from patcher.errors import MissingExtraError


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
