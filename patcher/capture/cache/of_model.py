"""Captures that were made before, for the model that is open now."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from patcher.capture.batches import Readable
from patcher.capture.cache.key import CaptureKey, capture_key
from patcher.capture.cache.store import CaptureCache
from patcher.capture.residuals import Residuals


@dataclass(frozen=True)
class Remembering:
    """The cache as one model sees it.

    Attributes:
        cache: where captures are kept.
        identity: of the model, from :func:`patcher.capture.cache.key.model_identity`.
        dtype, device, attention, blocks: see :func:`patcher.capture.cache.key.capture_key`.
        settings: all else that the last bits depend on.
        note: called with what ``-v`` shows.
    """

    cache: CaptureCache
    identity: Mapping[str, Any]
    dtype: torch.dtype
    device: str
    attention: str
    blocks: str
    settings: Mapping[str, Any]
    note: Callable[[str], None]

    def get(self, prompts: Sequence[Readable], layers: Sequence[int]) -> Mapping[int, Residuals] | None:
        """What was captured for these prompts and layers, if it is there."""
        found = self.cache.get(self._key(prompts, layers))
        if found is not None:
            self.note(f"activations of {len(prompts)} prompts are taken from the cache (--no-cache reads them anew)")
        return found

    def put(self, prompts: Sequence[Readable], layers: Sequence[int], residuals: Mapping[int, Residuals]) -> None:
        """Keep a capture; that it cannot be kept is no failure."""
        reason = self.cache.put(self._key(prompts, layers), residuals)
        if reason is not None:
            self.note(f"activations are not cached: {reason}")

    def _key(self, prompts: Sequence[Readable], layers: Sequence[int]) -> CaptureKey:
        return capture_key(
            self.identity,
            dtype=self.dtype,
            device=self.device,
            attention=self.attention,
            blocks=self.blocks,
            prompts=prompts,
            layers=layers,
            settings=self.settings,
        )
