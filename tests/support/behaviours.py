"""Measures for each behaviour apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BehaviourMeans:
    """The mean of a measure over the questions of one behaviour.

    Attributes:
        name: the behaviour.
        questions: how many there are.
        means: for each variant.
    """

    name: str
    questions: int
    means: tuple[float, ...]


def by_behaviour(names: Sequence[str], values: torch.Tensor) -> list[BehaviourMeans]:
    """Mean of each behaviour's questions, as CAA reports them (Rimsky et al. 2024).

    Contrast pairs do not carry the name of a behaviour: published sets have one file for each, and so has a recipe one
    vector. The name of the vector that a question belongs to is therefore its behaviour.

    Args:
        names: the behaviour of each question.
        values: [variants, questions], of any measure.

    Returns:
        The behaviours, in the order in which they first appear.
    """
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    return [
        BehaviourMeans(name, len(chosen), tuple(values[:, chosen].double().mean(dim=1).tolist()))
        for name, chosen in places.items()
    ]
