"""Where what may be computed again is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$PATCH_MODEL_CACHE``, else ``$XDG_CACHE_HOME/patch-model``, else ``~/.cache/patch-model``; not made here."""
    named = os.environ.get("PATCH_MODEL_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "patch-model"
