"""What a model makes of continuations: next-token logits and log-probabilities, batched."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from patcher.capture.batches import padded
from patcher.capture.forward import forward

_FULL_LOGITS_BATCH = 4


def last_token_logits(model: nn.Module, sequences: Sequence[Sequence[int]], batch_size: int) -> torch.Tensor:
    """The logits after the last token of each sequence: [sequences, vocabulary], fp32, on the CPU."""
    rows: list[torch.Tensor | None] = [None] * len(sequences)
    for chosen in _by_length(sequences, batch_size):
        inputs, _ = padded([sequences[index] for index in chosen], "right", 0)
        last = torch.tensor([len(sequences[index]) - 1 for index in chosen])
        kept = torch.unique(last)
        logits = _logits(model, inputs, kept)
        places = torch.searchsorted(kept, last)
        for row, index in enumerate(chosen):
            rows[index] = logits[row, places[row]].float().cpu()
    return torch.stack([row for row in rows if row is not None])


def mean_log_probs(
    model: nn.Module, sequences: Sequence[Sequence[int]], starts: Sequence[int], batch_size: int
) -> torch.Tensor:
    """For each sequence, the mean log-probability (nats a token) of its tokens from ``starts`` on: [sequences], fp64.

    The first token of a sequence has no context and is never scored; a sequence with nothing to score gives 0.
    """
    result = torch.zeros(len(sequences), dtype=torch.float64)
    for chosen in _by_length(sequences, min(batch_size, _FULL_LOGITS_BATCH)):
        inputs, _ = padded([sequences[index] for index in chosen], "right", 0)
        width = inputs["input_ids"].shape[1]
        logits = _logits(model, inputs, torch.arange(width))
        for row, index in enumerate(chosen):
            ids = torch.tensor(list(sequences[index]))
            start = max(1, starts[index])
            log_probs = torch.log_softmax(logits[row, start - 1 : max(start, len(ids)) - 1].float(), dim=-1).cpu()
            picked = log_probs.gather(-1, ids[start:, None])[:, 0]
            if len(picked):
                result[index] = picked.double().mean()
    return result


def _by_length(sequences: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _logits(model: nn.Module, inputs: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    """Logits at ``positions`` only, where the class can leave the others out."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        kept: Any = forward(model, inputs, logits_to_keep=positions.to(next(model.parameters()).device)).logits
        if kept.shape[1] == len(positions):
            return kept  # type: ignore[no-any-return]
    logits: torch.Tensor = forward(model, inputs, logits_to_keep=0).logits
    return logits[:, positions]
