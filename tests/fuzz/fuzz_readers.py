"""Every reader of files that come from elsewhere. A new one is a function with a decorator in one of these modules."""

from __future__ import annotations

import fuzz_cache_readers  # noqa: F401 - they register themselves
import fuzz_checkpoint_readers  # noqa: F401
import fuzz_folder_readers  # noqa: F401
import fuzz_gguf_readers  # noqa: F401
import fuzz_stock_readers  # noqa: F401
import fuzz_text_readers  # noqa: F401
import fuzz_vector_readers  # noqa: F401
from fuzz_registry import READERS

__all__ = ["READERS"]
