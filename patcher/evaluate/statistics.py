"""How far a mean could have come out otherwise with other texts, questions or pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_ELEMENTS = 2**24
"""Drawn at a time."""


def bootstrap_interval(
    values: Sequence[float] | torch.Tensor,
    seed: int,
    *,
    weights: Sequence[float] | torch.Tensor | None = None,
    level: float = 0.95,
    resamples: int = 2000,
) -> tuple[float, float]:
    """Percentile bootstrap of a mean (Efron 1979): the values are drawn again with replacement, as many as there are.

    For an effect give the differences of each question or text, steered minus base: the same ones are drawn of both.

    Args:
        values: one for each independent item (question, text, sentence), at least one.
        seed: of the drawing; the same seed, number of values and resamples draw the same items.
        weights: of the items, such as their tokens; the mean is then sum(weight * value) / sum(weight). Not negative,
            and not all 0.
        level: the fraction of resampled means that lie inside.
        resamples: how often all values are drawn again.

    Returns:
        The low and the high end; the value itself twice where there is only one, NaN where a value is not a number.
    """
    given = torch.as_tensor(values, dtype=torch.float64)
    weight = torch.ones_like(given) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    weight, given = weight[weight > 0], given[weight > 0]
    generator = torch.Generator().manual_seed(seed)
    means = []
    step = max(1, _ELEMENTS // len(given))
    for start in range(0, resamples, step):
        drawn = torch.randint(len(given), (min(step, resamples - start), len(given)), generator=generator)
        picked = weight[drawn]
        means.append((picked * given[drawn]).sum(dim=1) / picked.sum(dim=1))
    tail = (1 - level) / 2
    low, high = torch.quantile(torch.cat(means), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
