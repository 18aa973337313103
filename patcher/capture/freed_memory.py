"""Memory that the C library keeps between one batch and the next, where it would give it back and take it again.

Glibc hands every large block back to the system when it is freed. The next batch's activations then lie in pages that
the system has to clear first: a tenth of the time of a capture in bf16. Kept, they are also still in the caches.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

KEPT = 256 << 20
"""Bytes that stay with the process, at most, when they are freed."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Of mallopt(3)."""
_LARGEST = 32 << 20
"""What glibc takes at most for the size from which on a block is mapped by itself."""


def keep_freed_memory() -> None:
    """From now on, blocks up to 32 MiB are reused. Nothing happens where the C library is not glibc."""
    library = _glibc()
    if library is not None:
        library.mallopt(_MMAP_THRESHOLD, _LARGEST)
        library.mallopt(_TRIM_THRESHOLD, KEPT)


def give_back_freed_memory() -> None:
    """Hand to the system what is free now."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@functools.cache
def _glibc() -> Any:
    try:
        library = ctypes.CDLL(None)
        # Others have a mallopt of another meaning.
        _version, _mallopt, _trim = library.gnu_get_libc_version, library.mallopt, library.malloc_trim
    except (OSError, TypeError, AttributeError):
        return None
    return library
