"""How a build reads residuals: the model in memory or streamed, what may be computed together, the batches' size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from patcher.architectures.analysis import Architecture
from patcher.capture.batches import Readable
from patcher.capture.budget import token_budget
from patcher.capture.cache.of_model import Remembering
from patcher.capture.forward import position_limit
from patcher.capture.residuals import InMemory, Residuals, Runner, capture_residuals
from patcher.capture.shared_prefixes import exactness

Request = tuple[Sequence[Readable], Sequence[int]]
"""Prompts, and the layers that are read for them."""


@dataclass(frozen=True)
class ResidualReader:
    """Reads residuals for the vectors of a recipe.

    Attributes:
        runner: the model.
        architecture: what it is made of.
        tokens: the most tokens in a batch.
        batch_size: the most rows in a batch, or None.
        positions: how many positions the model has, if it has a table of them.
        one_pass: whether all requests are answered by one pass over the weights (they are read from the disk).
        note: called with what ``-v`` shows.
        memory: captures that were made before, or None.
    """

    runner: Runner
    architecture: Architecture
    tokens: int
    batch_size: int | None = None
    positions: int | None = None
    one_pass: bool = False
    note: Callable[[str], None] | None = None
    memory: Remembering | None = None

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.runner.hidden

    def read(
        self, requests: Sequence[Request], progress: Callable[[int, int], None] | None = None
    ) -> list[Mapping[int, Residuals]]:
        """The residuals that each request asks for.

        Args:
            requests: prompts and layers.
            progress: called with the number of prompts done and the number of all.

        Raises:
            InputError, OutsideError: see :func:`patcher.capture.residuals.capture_residuals`.
        """
        total, before = sum(len(prompts) for prompts, _layers in requests), 0
        if self.one_pass and len(requests) > 1:
            return self._in_one(requests, total, progress)
        found = []
        for prompts, layers in requests:
            found.append(self._capture(prompts, layers, before, total, progress))
            before += len(prompts)
        return found

    def _in_one(
        self, requests: Sequence[Request], total: int, progress: Callable[[int, int], None] | None
    ) -> list[Mapping[int, Residuals]]:
        everyone = [prompt for prompts, _layers in requests for prompt in prompts]
        layers = sorted({layer for _prompts, wanted in requests for layer in wanted})
        together = self._capture(everyone, layers, 0, total, progress)
        found: list[Mapping[int, Residuals]] = []
        start = 0
        for prompts, wanted in requests:
            end = start + len(prompts)
            found.append({layer: together[layer].part(start, end) for layer in wanted})
            start = end
        return found

    def _capture(
        self,
        prompts: Sequence[Readable],
        layers: Sequence[int],
        before: int,
        total: int,
        progress: Callable[[int, int], None] | None,
    ) -> Mapping[int, Residuals]:
        if not prompts or not layers:
            return {}
        found = None if self.memory is None else self.memory.get(prompts, layers)
        if found is not None:
            return found
        # A few prompts are read sooner than the proof takes that they may be read together.
        together = exactness(self.architecture, max(layers)) if len(prompts) > 1 else None
        found = capture_residuals(
            self.runner,
            prompts,
            layers,
            token_budget=self.tokens,
            batch_size=self.batch_size,
            exactness=together,
            positions=self.positions,
            progress=None if progress is None else lambda done: progress(before + done, total),
            note=self.note,
        )
        if self.memory is not None:
            self.memory.put(prompts, layers, found)
        return found


def reader_in_memory(
    model: nn.Module,
    architecture: Architecture,
    *,
    batch_size: int | None = None,
    note: Callable[[str], None] | None = None,
) -> ResidualReader:
    """A reader of a model that is loaded, wherever its parts lie."""
    runner = InMemory(model, architecture.blocks)
    config: Any = model.config
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    tokens = token_budget(config, device, runner.dtype)
    return ResidualReader(runner, architecture, tokens, batch_size, position_limit(model), note=note)
