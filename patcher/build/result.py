"""What a build gives: the plan of a dry run, the result of a build, and where the time went."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patcher.architectures.analysis import Architecture
from patcher.checkpoint.source import Source
from patcher.patched.schema import Manifest
from patcher.routes.plan import Plan
from patcher.vectors.finding import PreparedVector


@dataclass(frozen=True)
class DryRun:
    """What a build would do."""

    source: Source
    architecture: Architecture
    plan: Plan
    prepared: list[PreparedVector]
    output: Path
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.source.name,
            "revision": self.source.revision,
            "architecture": self.architecture.class_name,
            "blocks": self.architecture.block_count,
            "hidden": self.architecture.hidden,
            "route": self.plan.as_json(),
            "vectors": [
                {
                    "name": entry.spec.name,
                    "method": entry.spec.method,
                    "layers": list(entry.layers),
                    "read_layers": [entry.read_layers[layer] for layer in entry.layers],
                    "coefficient": entry.spec.coefficient,
                    "scale": entry.spec.scale,
                    "pairs": entry.pair_count,
                    "held_out": entry.held_out_count,
                }
                for entry in self.prepared
            ],
            "output": str(self.output),
            "notes": self.notes,
        }


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


@dataclass
class Clock:
    """Seconds by stage."""

    timings: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("load", "capture", "write", "hash", "verify", "total"), 0.0)
    )
    began: float = field(default_factory=time.perf_counter)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings[name] += time.perf_counter() - start

    def stop(self) -> dict[str, float]:
        self.timings["total"] = time.perf_counter() - self.began
        return {name: round(seconds, 4) for name, seconds in self.timings.items()}


def peak_rss_bytes() -> int:
    """The largest resident memory of this process or one that it ran, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    usage = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(usage) * unit
