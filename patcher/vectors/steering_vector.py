"""The result of everything before the route: a layer and what its residual stream gains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from patcher.vectors.methods import require_usable


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """One steering edit, ready to be stored.

    Attributes:
        name: from the recipe; for reports and the file.
        layer: 0-based decoder block after which the residual stream gains ``values``; -1 is the embedding.
        read_layer: the block after which the activations were read; None for a vector from a file.
        coefficient: what the direction was multiplied by; already inside ``values``.
        values: fp32 [hidden]: exactly what the residual stream gains, coefficient and scale included.
        residual_norm: mean norm of the residual stream at the read layer, if it was measured.
    """

    name: str
    layer: int
    read_layer: int | None
    coefficient: float
    values: torch.Tensor
    residual_norm: float | None

    def __post_init__(self) -> None:
        if self.values.dtype != torch.float32 or self.values.ndim != 1:
            raise ValueError(f"values must be fp32 [hidden], not {self.values.dtype} {list(self.values.shape)}")


def sum_by_layer(vectors: Sequence[SteeringVector]) -> dict[int, torch.Tensor]:
    """What each layer gains in all: layer -> [hidden] fp32.

    Raises:
        InputError: vectors of one layer cancel out.
    """
    sums: dict[int, torch.Tensor] = {}
    for vector in vectors:
        sums[vector.layer] = sums.get(vector.layer, torch.zeros(())) + vector.values.double()
    for layer, total in sums.items():
        require_usable(total.float(), name=" + ".join(v.name for v in vectors if v.layer == layer), layer=layer)
    return {layer: total.float() for layer, total in sorted(sums.items())}
