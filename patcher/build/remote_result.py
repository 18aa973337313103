"""What a remote build gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from patcher.patched.schema import Manifest


@dataclass(frozen=True)
class RemoteResult:
    """A finished remote build.

    Attributes:
        patch: the content of ``steering.json``.
        timings: seconds by stage.
        peak_rss_bytes: the largest resident memory.
        bytes_written: new files, in a temporary folder that is gone.
        bytes_downloaded: of the base's weights; none of those that lay in the cache were sent again.
        push: {url, commit, method, bytes_uploaded}.
    """

    patch: Manifest
    timings: Mapping[str, float]
    peak_rss_bytes: int
    bytes_written: int
    bytes_downloaded: int
    push: Mapping[str, Any]

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of ``steering.json``."""
        return self.patch.as_json()

    def as_json(self) -> dict[str, Any]:
        return {
            "output": None,
            "manifest": self.manifest,
            "timings": dict(self.timings),
            "peak_rss_bytes": self.peak_rss_bytes,
            "bytes_written": self.bytes_written,
            "bytes_downloaded": self.bytes_downloaded,
            "push": dict(self.push),
        }
