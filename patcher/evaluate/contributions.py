"""Which tokens make up the divergence of a steered model from its base."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class TokenContribution:
    """What one token adds to a divergence.

    Attributes:
        token: its id.
        contribution: nats a position.
        base: its mean probability before.
        steered: its mean probability under the vectors.
    """

    token: int
    contribution: float
    base: float
    steered: float


@dataclass(frozen=True)
class TokenContributions:
    """Which tokens make up KL(steered || base).

    Attributes:
        divergence: the sum over the whole vocabulary, nats a position.
        tokens: those that add most, the largest first.
    """

    divergence: float
    tokens: tuple[TokenContribution, ...]


@dataclass
class Contributions:
    """Sums over positions of p log(p / q) by token, p steered and q base, as they come in."""

    positions: int = 0
    _sums: list[torch.Tensor] = field(default_factory=list)

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Log-probabilities of some positions, [positions, vocabulary], without the vectors and under them."""
        p, q = after.exp(), before.exp()
        # A token that cannot be said adds nothing.
        parts = (torch.where(p > 0, p * (after - before), 0.0), q, p)
        # Apple's GPUs have no fp64.
        exact = torch.float32 if after.device.type == "mps" else torch.float64
        found = torch.stack([part.sum(dim=0, dtype=exact).cpu().double() for part in parts])
        self._sums = [self._sums[0] + found] if self._sums else [found]
        self.positions += len(after)

    def top(self, count: int) -> TokenContributions:
        """The ``count`` tokens with the largest contribution, and the sum of all; none where nothing came in."""
        if not self._sums:
            return TokenContributions(0.0, ())
        means = self._sums[0] / self.positions
        top = means[0].topk(min(count, means.shape[1])).indices.tolist()
        found = tuple(TokenContribution(token, *means[:, token].tolist()) for token in top)
        return TokenContributions(float(means[0].sum()), found)
