"""What a build gives."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patcher.patched.schema import Manifest

STAGES = ("start", "plan", "load", "capture", "evaluate", "write", "hash", "verify", "card")
"""Of a build, whose seconds are told."""


def peak_rss_bytes() -> int:
    """The largest resident memory of this process or one that it ran, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    usage = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(usage) * unit


@dataclass
class BuildResult:
    """A finished build.

    Attributes:
        output: the folder; None if the copy is on the Hub alone.
        patch: the content of ``steering.json``.
        timings: seconds by stage, and their sum, the ``total``.
        timing_parts: stage -> part -> seconds, of ``evaluate`` and ``verify``; their sum is the stage's.
        bytes_written: to the disk; of a remote build, to a temporary folder.
        placed: how the files of the folder came to be, see :class:`patcher.checkpoint.writer.Written`.
        bytes_downloaded: by a remote build, of the base's weights; none of those in the cache were sent again.
        push: {url, commit, method, bytes_uploaded}, where the copy was published.
        peak_rss_bytes: the largest resident memory.
    """

    output: Path | None
    patch: Manifest
    timings: dict[str, float]
    timing_parts: dict[str, dict[str, float]]
    bytes_written: int
    placed: Mapping[str, Any] = field(default_factory=dict)
    bytes_downloaded: int = 0
    push: dict[str, Any] | None = None
    peak_rss_bytes: int = field(default_factory=peak_rss_bytes)

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of ``steering.json``."""
        return self.patch.as_json()

    def as_json(self) -> dict[str, Any]:
        remote = self.output is None
        return {
            "output": None if remote else str(self.output),
            "manifest": self.manifest,
            "timings": self.timings,
            "timing_parts": self.timing_parts,
            "peak_rss_bytes": self.peak_rss_bytes,
            "bytes_written": self.bytes_written,
            **({"bytes_downloaded": self.bytes_downloaded} if remote else {"placed": dict(self.placed)}),
            **({"push": self.push} if self.push else {}),
        }
