"""Logits of a model under steering vectors, wherever its weights lie: in memory, or on the disk block by block."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from patcher.capture.forward import forward, input_device, steering_hooks


@dataclass(frozen=True)
class LogitsJob:
    """One forward pass under vectors.

    Attributes:
        inputs: ``input_ids``, ``attention_mask`` and ``position_ids``, [rows, width], int64.
        vectors: layer -> [hidden]: what the residual stream gains after that block, at every position.
        columns: [kept], int64: the columns whose logits are wanted.
    """

    inputs: Mapping[str, torch.Tensor]
    vectors: Mapping[int, torch.Tensor]
    columns: torch.Tensor


class LogitsSource(Protocol):
    """A model that can be asked for logits."""

    def logits(self, jobs: Sequence[LogitsJob], use: Callable[[int, torch.Tensor], None]) -> None:
        """Call ``use`` with the index of each job and its logits, [rows, kept, vocabulary]."""
        ...


class LoadedModel:
    """A model in memory, or spread by accelerate."""

    def __init__(self, model: nn.Module, blocks: str) -> None:
        self.model, self.blocks = model, blocks

    def logits(self, jobs: Sequence[LogitsJob], use: Callable[[int, torch.Tensor], None]) -> None:
        for number, job in enumerate(jobs):
            use(number, self.whole_pass(job))

    def whole_pass(self, job: LogitsJob) -> torch.Tensor:
        """The logits of one job, [rows, kept, vocabulary], from a pass through all blocks."""
        with steering_hooks(self.model, self.blocks, job.vectors):
            return kept_logits(self.model, job.inputs, job.columns)


def kept_logits(model: nn.Module, inputs: Mapping[str, torch.Tensor], columns: torch.Tensor) -> torch.Tensor:
    """Logits at ``columns`` only, [rows, kept, vocabulary]; the others are not computed where the class allows it."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        kept: Any = forward(model, inputs, logits_to_keep=columns.to(input_device(model))).logits
        if kept.shape[1] == len(columns):
            return kept  # type: ignore[no-any-return]
    logits: torch.Tensor = forward(model, inputs, logits_to_keep=0).logits
    return logits[:, columns]
