"""What a build gives."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patcher.patched.schema import Manifest

STAGES = ("load", "capture", "write", "hash", "verify")
"""Of a build, whose seconds are told."""


@dataclass
class BuildResult:
    """A finished build."""

    output: Path
    patch: Manifest
    timings: dict[str, float]
    peak_rss_bytes: int
    bytes_written: int
    placed: Mapping[str, Any]
    """How the files came to be, see :class:`patcher.checkpoint.writer.Written`."""
    push: dict[str, Any] | None = None

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of ``steering.json``."""
        return self.patch.as_json()

    def as_json(self) -> dict[str, Any]:
        result = {
            "output": str(self.output),
            "manifest": self.manifest,
            "timings": self.timings,
            "peak_rss_bytes": self.peak_rss_bytes,
            "bytes_written": self.bytes_written,
            "placed": dict(self.placed),
        }
        return {**result, "push": self.push} if self.push else result


def peak_rss_bytes() -> int:
    """The largest resident memory of this process or one that it ran, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    usage = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(usage) * unit
