"""A patched folder verified again, as ``patch-model verify`` does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from patcher.stacks.names import TRANSFORMERS
from patcher.verify.later import verify_folder_in


def verify_folder(folder: Path, **options: Any) -> dict[str, Any]:
    """In transformers: the one entry of :func:`patcher.verify.later.verify_folder_in`, whose options it takes."""
    return verify_folder_in(folder, [TRANSFORMERS], **options)[0]
