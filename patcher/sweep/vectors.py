"""The vectors of a sweep: those that cells are measured with, and those that a build of the recipe makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from patcher.capture.reader import ResidualReader
from patcher.recipe.vector import VectorSpec
from patcher.sweep.materials import Parts
from patcher.vectors.directions import Direction, steering_vector
from patcher.vectors.finding import find_directions
from patcher.vectors.prepared import PreparedVector


@dataclass(frozen=True)
class SweptDirections:
    """What was made of the activations, at every layer of the grid and of the defaults.

    Attributes:
        spec: of the vector that is swept.
        of_cells: layer -> of the first part of the pairs: cells are chosen with it.
        of_build: layer -> of all pairs that are not kept back: a build has it, and the choice is confirmed with it.
        refitted: layer -> with `refit`, of all pairs: what a build writes; only its damage is measured.
        others: of the recipe's other vectors, in their order.
    """

    spec: VectorSpec
    of_cells: Mapping[int, Direction]
    of_build: Mapping[int, Direction]
    refitted: Mapping[int, Direction]
    others: Sequence[Sequence[Direction]]

    @classmethod
    def read(
        cls,
        parts: Parts,
        index: int,
        planned: PreparedVector,
        reader: ResidualReader,
        neutral: Sequence[Sequence[int]],
        progress: Callable[[str], None],
    ) -> SweptDirections:
        """Read the base once for all of them.

        Args:
            planned: the vector as the recipe has it, at every layer.

        Raises:
            InputError: a file does not fit.
        """
        wanted = [*parts.prepared]
        if parts.whole is not None:
            wanted[index] = parts.whole
        # With `refit` the held-out pairs are read too, for a vector of all pairs.
        whole = [planned] if planned.rest_sides else []
        found = find_directions([*wanted, *whole], reader, neutral=neutral, progress=progress)
        refitted = found.pop() if whole else []
        swept = found.pop(index)
        return cls(
            wanted[index].spec,
            {each.layer: replace(each, of_all=None) for each in swept},
            {each.layer: each.of_all or each for each in swept},
            {each.layer: each.of_all or each for each in refitted},
            found,
        )

    def for_cells(self, layer: int, coefficient: float) -> torch.Tensor:
        """What a cell adds, fp32 [hidden]."""
        return self._vector(self.of_cells[layer], coefficient)

    def for_report(self, layer: int, coefficient: float) -> torch.Tensor:
        """What the effect is confirmed with, fp32 [hidden]."""
        return self._vector(self.of_build[layer], coefficient)

    def for_guard(self, layer: int, coefficient: float) -> torch.Tensor:
        """What a build writes, and measures its guard with, fp32 [hidden]."""
        return self._vector(self.refitted.get(layer, self.of_build[layer]), coefficient)

    def _vector(self, direction: Direction, coefficient: float) -> torch.Tensor:
        return steering_vector(self.spec.model_copy(update={"coefficient": coefficient}), direction).values
