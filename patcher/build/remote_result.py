"""What a remote build plans and gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from patcher.build.remote_planning import Needed
from patcher.build.result import DryRun
from patcher.checkpoint.block_names import BlockNames
from patcher.checkpoint.hub_folder import HubCheckpoint
from patcher.patched.schema import Manifest


@dataclass(frozen=True)
class RemoteDryRun:
    """What a remote build would do.

    Attributes:
        planned: as of a build with an output folder; its ``output`` is the repository.
        checkpoint: the base, by its headers.
        names: how its tensors are told apart.
        needed: the weight files that would be downloaded.
    """

    planned: DryRun
    checkpoint: HubCheckpoint
    names: BlockNames
    needed: Needed

    @property
    def download(self) -> dict[str, Any]:
        """{files, bytes, of_files, of_bytes}: of the weight files."""
        every = self.checkpoint.weight_files
        return {
            "files": self.needed.files,
            "bytes": self.checkpoint.bytes_of(self.needed.files),
            "of_files": len(every),
            "of_bytes": self.checkpoint.bytes_of(every),
        }

    def as_json(self) -> dict[str, Any]:
        return {**self.planned.as_json(), "output": None, "repo": str(self.planned.output), "download": self.download}


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
