"""What a model was run for: counted in passes of one token through all of its blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Meter:
    """Counts full-depth passes: tokens times blocks computed, over all blocks. Tokens that fill up a batch count.

    Attributes:
        blocks: how many the model has.
        spent: full-depth passes so far.
    """

    blocks: int
    spent: float = 0.0

    def add(self, tokens: int, blocks: int | None = None) -> None:
        """``tokens`` went through ``blocks`` of the blocks; through all of them by default."""
        self.spent += tokens * (self.blocks if blocks is None else blocks) / self.blocks

    @contextlib.contextmanager
    def watching(self, model: nn.Module, blocks: str) -> Iterator[None]:
        """While open, every pass of the model itself (such as those of ``generate``) counts at full depth."""

        def count(_block: nn.Module, inputs: tuple[object, ...], keywords: dict[str, object]) -> None:
            hidden = inputs[0] if inputs else keywords.get("hidden_states")
            if isinstance(hidden, torch.Tensor):
                self.add(hidden.shape[0] * hidden.shape[1])

        with_it = model.get_submodule(f"{blocks}.0").register_forward_pre_hook(count, with_kwargs=True)
        try:
            yield
        finally:
            with_it.remove()
