"""Captures that were made before, for the model that is open now."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from patcher.capture.batches import Readable
from patcher.capture.cache.key import CaptureKey
from patcher.capture.cache.store import CaptureCache
from patcher.capture.residuals import Residuals


@dataclass(frozen=True)
class Remembering:
    """The cache as one model sees it.

    Attributes:
        cache: where captures are kept.
        key: :func:`patcher.capture.cache.key.capture_key` with all of its arguments but ``prompts`` and ``layers``.
        note: called with what ``-v`` shows.
    """

    cache: CaptureCache
    key: Callable[..., CaptureKey]
    note: Callable[[str], None]

    def get(self, prompts: Sequence[Readable], layers: Sequence[int]) -> Mapping[int, Residuals] | None:
        """What was captured for these prompts and layers, if it is there."""
        found = self.cache.get(self.key(prompts=prompts, layers=layers))
        if found is not None:
            self.note(f"activations of {len(prompts)} prompts are taken from the cache (--no-cache reads them anew)")
        return found

    def put(self, prompts: Sequence[Readable], layers: Sequence[int], residuals: Mapping[int, Residuals]) -> None:
        """Keep a capture; that it cannot be kept is no failure."""
        reason = self.cache.put(self.key(prompts=prompts, layers=layers), residuals)
        if reason is not None:
            self.note(f"activations are not cached: {reason}")
