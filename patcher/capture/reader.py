"""How a build reads residuals: the model in memory or streamed, what may be computed together, the batches' size."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from patcher.architectures.analysis import Architecture
from patcher.architectures.config_keys import stated
from patcher.architectures.decoder import decoder_config
from patcher.capture.batches import Readable, image_in
from patcher.capture.cache.store import Remembering
from patcher.capture.forward import position_limit
from patcher.capture.meter import Meter
from patcher.capture.residuals import InMemory, Progress, Residuals, Runner, capture_residuals
from patcher.capture.shared_prefixes import exactness

Request = tuple[Sequence[Readable], Sequence[int]]
"""Prompts, and the layers that are read for them."""

CPU_TOKENS = 512
"""In a batch. More hardly make the matrix products faster, fill up more, and push activations out of the caches."""
_MOST_TOKENS = 65_536
_LEAST_TOKENS = 256
# Of the free memory of an accelerator; the allocator loses some to fragments, and a batch that fails is halved anyway.
_FRACTION = 0.5


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
        total, done = sum(len(prompts) for prompts, _layers in requests), 0
        found = [self._remembered(*request) for request in requests]
        missing = [number for number, known in enumerate(found) if known is None]
        for numbers in [missing] if self.one_pass and missing else [[number] for number in missing]:
            asked, before = [requests[number] for number in numbers], done
            told: Progress = None if progress is None else lambda now, before=before: progress(before + now, total)
            for number, read in zip(numbers, self._capture(asked, told), strict=True):
                found[number] = read
                done += len(requests[number][0])
                if self.memory is not None:
                    self.memory.put(*requests[number], read)
        return [read or {} for read in found]

    def _remembered(self, prompts: Sequence[Readable], layers: Sequence[int]) -> Mapping[int, Residuals] | None:
        if not prompts or not layers:
            return {}
        return None if self.memory is None else self.memory.get(prompts, layers)

    def _capture(self, requests: Sequence[Request], progress: Progress) -> list[Mapping[int, Residuals]]:
        """What requests ask for, read in one pass: each as it would be alone, and those of the same prompts once."""
        groups: dict[tuple[tuple[Any, ...], ...], Sequence[Readable]] = {}
        keys = [tuple(map(_key, prompts)) for prompts, _layers in requests]
        for key, (prompts, _layers) in zip(keys, requests, strict=True):
            groups.setdefault(key, prompts)
        sizes = [len(prompts) for prompts in groups.values()]
        layers = sorted({layer for _prompts, wanted in requests for layer in wanted})
        # A few prompts are read sooner than the proof takes that they may be read together.
        texts = max(sum(image_in(prompt) is None for prompt in prompts) for prompts in groups.values())
        together = exactness(self.architecture, max(layers)) if texts > 1 else None
        found = capture_residuals(
            self.runner,
            [prompt for prompts in groups.values() for prompt in prompts],
            layers,
            exactness=together,
            token_budget=self.tokens,
            groups=sizes,
            batch_size=self.batch_size,
            positions=self.positions,
            progress=progress,
            note=self.note,
        )
        starts = dict(zip(groups, itertools.accumulate(sizes, initial=0), strict=False))
        return [
            {layer: found[layer].part(starts[key], starts[key] + len(prompts)) for layer in wanted}
            for key, (prompts, wanted) in zip(keys, requests, strict=True)
        ]


def _key(prompt: Readable) -> tuple[Any, ...]:
    image = image_in(prompt)
    return tuple(prompt.ids), tuple(prompt.read), image and image.key


def reader_in_memory(
    model: nn.Module,
    architecture: Architecture,
    *,
    batch_size: int | None = None,
    note: Callable[[str], None] | None = None,
    meter: Meter | None = None,
) -> ResidualReader:
    """A reader of a model that is loaded, wherever its parts lie; ``meter`` counts what it is run for."""
    runner = InMemory(model, architecture.blocks, meter)
    config = decoder_config(model.config)
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    tokens = token_budget(config, device, runner.dtype)
    return ResidualReader(runner, architecture, tokens, batch_size, position_limit(model), note=note)


def token_budget(config: Any, device: torch.device, dtype: torch.dtype) -> int:
    """The most tokens a batch may hold on this device, by its free memory and the widths of the model."""
    if device.type != "cuda":
        return CPU_TOKENS
    free, _total = torch.cuda.mem_get_info(device)
    hidden = int(config.hidden_size)
    inner = stated(config, "intermediate_size")
    widest = inner if isinstance(inner, int) else 4 * hidden
    # The residual stream and what attention makes of it; the MLP's inner activations; fp32 copies in the norms.
    per_token = dtype.itemsize * (12 * hidden + 4 * widest) + 8 * hidden
    tokens = max(_LEAST_TOKENS, min(_MOST_TOKENS, int(_FRACTION * free / per_token)))
    # A power of two, so that a little more or less free memory does not change the last bits of a result.
    return 1 << (tokens.bit_length() - 1)
