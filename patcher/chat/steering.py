"""What is added to the residual stream, and how it follows the coefficient and the layer that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from patcher.capture.forward import EMBEDDING
from patcher.errors import InputError
from patcher.evaluate.scoring import Vectors

_ORIGINS = {"baked": ("as baked", "the baked"), "recipe": ("as in the recipe", "the recipe's")}


@dataclass(frozen=True)
class Steering:
    """The vectors of a patched folder or of a recipe.

    Attributes:
        vectors: layer -> [hidden] fp32, as baked or as the recipe says.
        coefficients: name -> its coefficient inside ``vectors``.
        origin: where they are from.
        block_count: of the model.
        move: gives the vectors for another layer.
        moved: what the user should know of vectors that were moved.
        fixed: why nothing can be changed, or None.
    """

    vectors: Vectors
    coefficients: Mapping[str, float]
    origin: Literal["baked", "recipe"]
    block_count: int
    move: Callable[[int], Vectors]
    moved: str
    fixed: InputError | None = None
    _known: dict[int, Vectors] = field(default_factory=dict)

    @property
    def coefficient(self) -> float:
        """The coefficient of the vectors as they are: of a single vector its own, else 1, for all of them."""
        return next(iter(self.coefficients.values())) if len(self.coefficients) == 1 else 1.0

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted(self.vectors))

    def factor(self, coefficient: float) -> float:
        """What the vectors as they are have to be multiplied by."""
        return coefficient / self.coefficient

    def at(self, coefficient: float, layer: int | None) -> dict[int, torch.Tensor]:
        """What the residual stream gains: layer -> [hidden] fp32; nothing for a coefficient of 0.

        Args:
            coefficient: of a single vector its coefficient; of several what multiplies them all.
            layer: 0-based block index, -1 for the embedding, or None for where the vectors are.

        Raises:
            InputError: there is no such layer, or the vectors cannot be had there.
        """
        vectors = self.vectors if layer is None or self.layers == (layer,) else self._at_layer(layer)
        factor = self.factor(coefficient)
        if factor == 0:
            return {}
        return {place: (factor * values.double()).float() for place, values in vectors.items()}

    def label(self, coefficient: float, layer: int | None = None) -> str:
        """Coefficient and layer in a few words."""
        single = len(self.coefficients) == 1
        text = f"coefficient {coefficient:.4g}" if single else f"{coefficient:.4g} times all vectors"
        return f"{text}, {named_layers(self.layers if layer is None else (layer,))}"

    def described(self, coefficient: float, layer: int | None = None) -> str:
        """The same, and what it is beside the vectors as they are."""
        same, whose = _ORIGINS[self.origin]
        factor, label = self.factor(coefficient), self.label(coefficient, layer)
        if factor == 1:
            return f"{label} ({same})"
        if len(self.coefficients) == 1:
            return f"{label} ({factor:.4g} times {whose} {self.coefficient:.4g})"
        return f"{label} (1: {same})"

    def _at_layer(self, layer: int) -> Vectors:
        if not EMBEDDING <= layer < self.block_count:
            raise InputError(
                f"the model has {self.block_count} decoder blocks",
                where="layer",
                found=layer,
                remedy=f"use 0 to {self.block_count - 1}, or -1 for the embedding",
            )
        if layer not in self._known:
            self._known[layer] = self.move(layer)
        return self._known[layer]


def named_layers(layers: tuple[int, ...]) -> str:
    """`layer 3`, `layers 3, 5`, `the embedding`."""
    if layers == (EMBEDDING,):
        return "the embedding"
    shown = ", ".join("the embedding" if layer == EMBEDDING else str(layer) for layer in layers)
    return f"{'layer' if len(layers) == 1 else 'layers'} {shown}"
