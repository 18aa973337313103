"""Logits of a model under steering vectors, wherever its weights lie: in memory, or on the disk block by block."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from patcher.capture.forward import forward, input_device, steering_hooks
from patcher.capture.layout import Layout
from patcher.capture.meter import Meter


@dataclass(frozen=True)
class LogitsJob:
    """One forward pass under vectors.

    Attributes:
        inputs: ``input_ids``, ``attention_mask`` and ``position_ids``, as a batch's
            ``inputs_in`` gives them.
        vectors: layer -> [hidden]: what the residual stream gains after that block, at every position.
        columns: [kept], int64: the columns whose logits are wanted.
        rows: [kept], int64: the row of each of these columns; None: those columns of every row.
    """

    inputs: Mapping[str, torch.Tensor]
    vectors: Mapping[int, torch.Tensor]
    columns: torch.Tensor
    rows: torch.Tensor | None = None


class LogitsSource(Protocol):
    """A model that can be asked for logits.

    Attributes:
        meter: counts what it is run for.
        layout: how its rows may be made.
    """

    meter: Meter
    layout: Layout

    @property
    def dtype(self) -> torch.dtype:
        """That its blocks compute in."""
        ...

    def logits(self, jobs: Sequence[LogitsJob], use: Callable[[int, torch.Tensor], None]) -> None:
        """Call ``use`` with the index of each job and its logits.

        They are [rows, kept, vocabulary], or [kept, vocabulary] where a job names the row of each column.
        """
        ...

    def cost(self, tokens: int, variants: Sequence[Mapping[int, torch.Tensor]], *, again: bool = False) -> float:
        """What ``tokens`` cost under these vectors, in full-depth passes.

        Args:
            again: the same tokens were run before, and what lies before the first steered block is kept.
        """
        ...


class LoadedModel:
    """A model in memory, or spread by accelerate."""

    def __init__(self, model: nn.Module, blocks: str, layout: Layout | None = None, meter: Meter | None = None) -> None:
        self.model, self.blocks = model, blocks
        self.meter = meter or Meter(len(model.get_submodule(blocks)))  # type: ignore[arg-type]
        self.layout = layout or Layout()

    @property
    def dtype(self) -> torch.dtype:
        """That its blocks compute in."""
        return next(parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point())

    def logits(self, jobs: Sequence[LogitsJob], use: Callable[[int, torch.Tensor], None]) -> None:
        for number, job in enumerate(jobs):
            use(number, self.whole_pass(job))

    def whole_pass(self, job: LogitsJob) -> torch.Tensor:
        """The logits of one job, as :meth:`LogitsSource.logits` gives them, from a pass through all blocks."""
        self.meter.add(job.inputs["input_ids"].numel())
        with steering_hooks(self.model, self.blocks, job.vectors):
            return job_logits(self.model, job.inputs, job.columns, job.rows)

    def cost(self, tokens: int, variants: Sequence[Mapping[int, torch.Tensor]], *, again: bool = False) -> float:
        return float(tokens * len(variants))


def job_logits(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], columns: torch.Tensor, rows: torch.Tensor | None
) -> torch.Tensor:
    """Logits at ``columns`` of every row [rows, kept, vocabulary], or of each one's own row [kept, vocabulary].

    The others are not computed where the class allows it.
    """
    return kept_logits(model, inputs, columns) if rows is None else _picked_logits(model, inputs, columns, rows)


def _picked_logits(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], columns: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """Its head is given the chosen positions in the place of all of them, where the class has a head of its own."""
    shape, head, picked = tuple(inputs["input_ids"].shape), _head(model), False

    def pick(_head: nn.Module, given: tuple[Any, ...]) -> Any:
        nonlocal picked
        if len(given) == 1 and isinstance(given[0], torch.Tensor) and tuple(given[0].shape[:-1]) == shape:
            picked = True
            return (given[0][rows.to(given[0].device), columns.to(given[0].device)][None],)
        return None

    with contextlib.nullcontext() if head is None else head.register_forward_pre_hook(pick):
        logits: torch.Tensor = forward(model, inputs, logits_to_keep=0).logits
    if picked and tuple(logits.shape[:2]) == (1, len(columns)):
        return logits[0]
    if picked:
        # The class does more with them than its head; all are computed then.
        logits = forward(model, inputs, logits_to_keep=0).logits
    return logits[rows.to(logits.device), columns.to(logits.device)]


def _head(model: nn.Module) -> nn.Module | None:
    named: Any = getattr(model, "get_output_embeddings", None)
    try:
        found = None if named is None else named()
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, nn.Module) else None


def kept_logits(model: nn.Module, inputs: Mapping[str, torch.Tensor], columns: torch.Tensor) -> torch.Tensor:
    """Logits at ``columns`` only, [rows, kept, vocabulary]; the others are not computed where the class allows it."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        kept: Any = forward(model, inputs, logits_to_keep=columns.to(input_device(model))).logits
        if kept.shape[1] == len(columns):
            return kept  # type: ignore[no-any-return]
    logits: torch.Tensor = forward(model, inputs, logits_to_keep=0).logits
    return logits[:, columns]
