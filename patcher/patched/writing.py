"""Writing a patched folder's ``steering.json``: the only way from its types to the file."""

from __future__ import annotations

from pathlib import Path

from patcher.checkpoint.steering_files import MANIFEST
from patcher.patched.schema import Manifest


def write_manifest(folder: Path, manifest: Manifest) -> int:
    """Write ``steering.json``; the number of bytes."""
    return (folder / MANIFEST).write_bytes(manifest.text().encode())
