"""What small residual streams lose of an inserted block's constant, measured on the stand-in."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch

from patcher.routes.carrier.fills import Fill
from patcher.routes.carrier.trial import SCALES, InsertionTrial
from patcher.routes.constant import Loss

_SMALL = (0.003, 0.02)
_SEEN = 1e-6
"""A smaller share of the vector, lost at the smallest scale, is fp32's own."""


def loss_of(trial: InsertionTrial, fills: Mapping[str, Fill], vector: torch.Tensor) -> Loss:
    """The loss of a content under which the stand-in's block adds a multiple of ``vector`` ([hidden])."""
    trial.set(fills, vector)
    direction = vector.double() / float(vector.double() @ vector.double())
    *small, large = [gained.double() @ direction for gained in trial.gains((*_SMALL, SCALES[-1]))]
    lost = [(large.mean() / share - 1.0).clamp(min=1e-12) for share in small]
    if not float(lost[0].median()) > _SEEN:
        return Loss()
    found = []
    for power, centred in itertools.product((1, 2), (False, True)):
        squares = [Loss(centred=centred).mean_squares(trial.moments(scale)) for scale in _SMALL]
        estimates = [m * share ** (1.0 / power) for m, share in zip(squares, lost, strict=True)]
        # The scale nearer to real streams, where fp32 still shows it.
        epsilon = float(estimates[1 if float(lost[1].median()) > 1e-4 else 0].median())
        spread = max(float((estimate / epsilon - 1.0).abs().median()) for estimate in estimates)
        found.append((spread, Loss(epsilon, power, centred)))
    return min(found, key=lambda fit: fit[0])[1]
