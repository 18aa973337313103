"""The constant that an inserted block adds: how far it is off where residual streams are small.

A constant that is a norm's sum of squares is short by the norm's epsilon: a token whose residual has the mean square m
gains m / (m + epsilon) of the vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch

Source = Literal["embedding rows", "captured activations"]


@dataclass(frozen=True)
class Loss:
    """What is lost of the vector.

    Attributes:
        epsilon: a residual of mean square m gains 1 / (1 + (epsilon / m) ** power) of the vector; 0: all of it.
        power: 1, or 2 where a block's only norm follows its projection; its epsilon counts far less.
        centred: whether m is the variance, since the norm takes the mean away.
    """

    epsilon: float = 0.0
    power: int = 1
    centred: bool = False

    def kept(self, moments: torch.Tensor) -> torch.Tensor:
        """The share of the vector that is gained, fp64 [...], by residuals of these moments.

        Args:
            moments: fp64 [..., 2], see :func:`moments_of`.
        """
        return 1.0 / (1.0 + (self.epsilon / self.mean_squares(moments)) ** self.power)

    def mean_squares(self, moments: torch.Tensor) -> torch.Tensor:
        """What counts as the mean square, fp64 [...], never 0."""
        return moments[..., 1 if self.centred else 0].clamp(min=1e-30)


def moments_of(residuals: torch.Tensor) -> torch.Tensor:
    """The mean square and the variance of residuals [..., hidden], fp64 [..., 2]."""
    residuals = residuals.double()
    return torch.stack([residuals.square().mean(dim=-1), residuals.var(dim=-1, unbiased=False)], dim=-1)


@dataclass(frozen=True)
class ConstantError:
    """How far the constant of an inserted block is off on this model's own residual stream.

    Of several steered layers, it is that of the worst.

    Attributes:
        epsilon: of the norm.
        mean_squares: min, median and max of m over the tokens that were looked at (of a norm that takes the mean away,
            of the variance); None if none were.
        set_for: the m that the constant is right for; None: it is right for a stream that is large.
        typical: relative error of the added vector that is left, the median over the tokens.
        worst: the same, the largest.
        measured_on: ``embedding rows`` (what enters block 0) or ``captured activations``.
        layer: the layer that this is of.
        expected: the largest difference of a log-probability from the hook's that this makes, as it was computed; None
            if it was not.
        losses: steered layer -> what is lost there. Not recorded.
        settings: steered layer -> the share of the vector that its constant is set for. Not recorded.
    """

    epsilon: float
    mean_squares: tuple[float, float, float] | None = None
    set_for: float | None = None
    typical: float | None = None
    worst: float | None = None
    measured_on: Source | None = None
    layer: int | None = None
    expected: float | None = None
    losses: Mapping[int, Loss] = field(default_factory=dict)
    settings: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, losses: Mapping[int, Loss]) -> ConstantError | None:
        """Of what is lost at each layer, before anything is measured; None if nothing is."""
        lossy = {layer: loss for layer, loss in losses.items() if loss.epsilon}
        return cls(max(loss.epsilon for loss in lossy.values()), losses=lossy) if lossy else None

    def measured(self, moments: Mapping[int, torch.Tensor], source: Source, *, corrected: bool) -> ConstantError:
        """With the numbers of a residual stream.

        Args:
            moments: layer -> fp64 [tokens, 2], see :func:`moments_of`.
            corrected: whether the constant is set so that the largest error over these tokens is the smallest.
        """
        settings = {layer: self._setting(layer, moments) if corrected else 1.0 for layer in self.losses}
        found = []
        for layer, loss in self.losses.items():
            squares, setting = loss.mean_squares(moments[layer]), settings[layer]
            error = (loss.kept(moments[layer]) / setting - 1.0).abs()
            right_for = loss.epsilon / (1.0 / setting - 1.0) ** (1.0 / loss.power) if setting < 1.0 else None
            found.append(
                replace(
                    self,
                    epsilon=loss.epsilon,
                    mean_squares=(float(squares.min()), float(squares.median()), float(squares.max())),
                    set_for=right_for,
                    typical=float(error.median()),
                    worst=float(error.max()),
                    measured_on=source,
                    layer=layer,
                    settings=settings,
                )
            )
        return max(found, key=lambda error: error.worst or 0.0)

    def _setting(self, layer: int, moments: Mapping[int, torch.Tensor]) -> float:
        kept = self.losses[layer].kept(moments[layer])
        least, most = float(kept.min()), float(kept.max())
        return 2.0 * least * most / (least + most)

    def gained(self, layer: int, moments: torch.Tensor) -> torch.Tensor:
        """The multiple of the vector that residuals of these moments gain at a steered layer, fp64 [...]."""
        loss = self.losses.get(layer, Loss())
        return loss.kept(moments) / self.settings.get(layer, 1.0)

    def as_json(self) -> dict[str, Any]:
        """For the manifest."""
        found = asdict(replace(self, losses={}, settings={}))
        del found["losses"], found["settings"]
        return {**found, "mean_squares": None if self.mean_squares is None else list(self.mean_squares)}

    def in_words(self) -> str:
        """How far it is off, and beside what."""
        if self.mean_squares is None:
            return f"short by the norm's epsilon ({self.epsilon:.2g}) over the residual stream's mean square"
        least, median, most = self.mean_squares
        return (
            f"off by {self.typical:.2g} of the vector, for some tokens by {self.worst:.2g}: after block {self.layer} "
            f"the residual stream's mean square is {median:.2g} ({least:.2g} to {most:.2g}), beside the norm's "
            f"epsilon of {self.epsilon:.2g}"
        )
