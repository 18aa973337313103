"""What a model makes of continuations under each of several steering vectors, batched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from patcher.capture.batches import padded
from patcher.capture.logits import LogitsJob, LogitsSource

Vectors = Mapping[int, torch.Tensor]
"""Layer -> what the residual stream gains after it, [hidden]."""

_FULL_LOGITS_BATCH = 4


Origin = tuple[int, list[int], torch.Tensor]
"""Of a job: its variant, the indices of its sequences, and the place of each one's last token among the columns."""


def jobs_of(
    sequences: Sequence[Sequence[int]], batches: Iterable[list[int]], variants: Sequence[Vectors], *, last_only: bool
) -> tuple[list[LogitsJob], list[Origin]]:
    """Every batch of sequences under every variant; the variants of a batch follow one another and share its inputs.

    Args:
        batches: indices of sequences, those of one forward pass together.
        last_only: only the logits of the columns where a sequence ends are wanted.
    """
    jobs: list[LogitsJob] = []
    origins: list[Origin] = []
    for chosen in batches:
        inputs, _ = padded([sequences[index] for index in chosen], "right", 0)
        last = torch.tensor([len(sequences[index]) - 1 for index in chosen])
        columns = torch.unique(last) if last_only else torch.arange(inputs["input_ids"].shape[1])
        jobs += [LogitsJob(inputs, vectors, columns) for vectors in variants]
        origins += [(variant, chosen, torch.searchsorted(columns, last)) for variant in range(len(variants))]
    return jobs, origins


def next_token_logits(
    source: LogitsSource,
    sequences: Sequence[Sequence[int]],
    tokens: Sequence[Sequence[int]],
    variants: Sequence[Vectors],
    batch_size: int,
) -> list[list[torch.Tensor]]:
    """For each variant and each sequence, the logits of the sequence's ``tokens`` after its last one; fp32, CPU."""
    found = [[torch.empty(0)] * len(sequences) for _ in variants]
    jobs, origins = jobs_of(sequences, _by_length(sequences, batch_size), variants, last_only=True)

    def use(number: int, logits: torch.Tensor) -> None:
        variant, chosen, places = origins[number]
        for row, index in enumerate(chosen):
            found[variant][index] = logits[row, places[row], list(tokens[index])].float().cpu()

    source.logits(jobs, use)
    return found


def mean_log_probs(
    source: LogitsSource,
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int],
    variants: Sequence[Vectors],
    batch_size: int,
) -> torch.Tensor:
    """Mean log-probability (nats a token) of a sequence's tokens from ``starts`` on: [variants, sequences], fp64.

    The first token of a sequence has no context and is never scored; a sequence with nothing to score gives 0.
    """
    result = torch.zeros(len(variants), len(sequences), dtype=torch.float64)
    batches = _by_length(sequences, min(batch_size, _FULL_LOGITS_BATCH))
    jobs, origins = jobs_of(sequences, batches, variants, last_only=False)

    def use(number: int, logits: torch.Tensor) -> None:
        variant, chosen, _last = origins[number]
        for row, index in enumerate(chosen):
            ids = torch.tensor(list(sequences[index]))
            start = max(1, starts[index])
            log_probs = torch.log_softmax(logits[row, start - 1 : max(start, len(ids)) - 1].float(), dim=-1).cpu()
            picked = log_probs.gather(-1, ids[start:, None])[:, 0]
            if len(picked):
                result[variant, index] = picked.double().mean()

    source.logits(jobs, use)
    return result


def perplexities(
    source: LogitsSource, texts: Sequence[Sequence[int]], variants: Sequence[Vectors], batch_size: int
) -> list[float]:
    """exp of the mean negative log-probability a token, averaged over all tokens of all passages, for each variant."""
    means = mean_log_probs(source, texts, [1] * len(texts), variants, batch_size)
    lengths = torch.tensor([len(ids) - 1 for ids in texts], dtype=torch.float64)
    return torch.exp(-(means * lengths).sum(dim=1) / lengths.sum()).tolist()


def _by_length(sequences: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
