"""Every reader of files that come from elsewhere. A new one is a function with a decorator in one of these modules."""

from __future__ import annotations

from support.fuzz import (  # noqa: F401 - they register themselves
    cache_readers,
    checkpoint_readers,
    folder_readers,
    gguf_readers,
    stock_readers,
    text_readers,
    vector_readers,
)
from support.fuzz.registry import READERS

__all__ = ["READERS"]
