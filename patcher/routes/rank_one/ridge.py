"""The fit behind the rank-one route: weights a with a'z close to a target on every token, by streamed ridge regression.

The activations pass once and are not kept. What stays is their second moments in fp64 (width x width), or, where the
MLP is too wide for that, the second moments in an orthonormal basis of a sample of the activations. The strength of
the ridge is the one that serves activations best that took no part in the fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from patcher.errors import InputError

RIDGES = tuple(10.0**power for power in range(-8, 1))
"""Strengths that are tried, in units of the mean second moment of a feature."""
MAX_WIDTH = 16384
"""Wider activations than this are fitted in a basis of ``BASIS`` directions."""
BASIS = 8192
_KEPT_NUMBERS = 1 << 26


@dataclass(frozen=True)
class HeldOut:
    """Activations that took no part in a fit.

    Attributes:
        activations: [tokens, width] fp32.
        targets: [tokens] fp64; what a'z should be.
        weights: [tokens] fp64; how much a token matters.
    """

    activations: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class Fitted:
    """A fit.

    Attributes:
        right: [width] fp32; the fitted a.
        ridge: the strength that was chosen, in units of the mean second moment of a feature.
        tokens: tokens that were fitted.
    """

    right: torch.Tensor
    ridge: float
    tokens: int


class ConstantFit:
    """Streaming ridge regression of a target (by default the constant 1) on activations, without an intercept.

    Args:
        width: number of features of an activation.
        rank: fit in an orthonormal basis of this many sampled activations; None: in all ``width`` directions where
            ``width <= MAX_WIDTH``, else in ``BASIS`` of them. The tokens that make up the basis are the first ones,
            so texts should come in a random order. What a linear function of z does on the data depends on its part
            in the span of the data alone, and a sample spans the directions in which the data is large, which is why
            this loses far less than as many random directions or single features would.
        seed: of the sample of held-out tokens, which is bounded.
    """

    def __init__(self, width: int, *, rank: int | None = None, seed: int = 0) -> None:
        self.width = width
        self.rank = rank if rank is not None else (None if width <= MAX_WIDTH else BASIS)
        if self.rank is not None and self.rank >= width:
            self.rank = None
        self.tokens = 0
        self._gram: torch.Tensor | None = None
        self._moment: torch.Tensor | None = None
        self._target_sum = 0.0
        self._basis: torch.Tensor | None = None
        self._waiting: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._capacity = max(1024, min(1 << 16, _KEPT_NUMBERS // max(width, 1)))
        self._keys: list[torch.Tensor] = []
        self._generator = torch.Generator().manual_seed(seed)

    def update(
        self,
        activations: torch.Tensor,
        targets: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        *,
        held_out: bool = False,
    ) -> None:
        """Take in some tokens.

        Args:
            activations: [tokens, width], any float dtype and device; the products are summed in fp64.
            targets: [tokens]; 1 by default.
            weights: [tokens], not negative; 1 by default.
            held_out: keep them out of the fit (a seeded sample of them, where they are many).

        Raises:
            InputError: something in them is not finite.
        """
        if not len(activations):
            return
        if activations.device.type == "mps":  # it has no fp64
            activations = activations.cpu()
        device = activations.device
        ones = torch.ones(len(activations), dtype=torch.float64, device=device)
        goal = ones if targets is None else targets.to(device, torch.float64)
        weight = ones if weights is None else weights.to(device, torch.float64)
        if not all(bool(torch.isfinite(part).all()) for part in (activations, goal, weight)):
            raise InputError(
                "the model computes MLP activations that are not finite",
                remedy="run the calibration in a wider dtype: dtype: float32 (or bfloat16 instead of float16)",
            )
        if held_out:
            self._keep(activations.float().cpu(), goal.cpu(), weight.cpu())
            return
        self.tokens += len(activations)
        if self.rank is None or self._basis is not None:
            self._add(activations, goal, weight)
            return
        self._waiting.append((activations, goal, weight))
        if sum(len(part) for part, _goal, _weight in self._waiting) >= self.rank:
            self._settle_basis()

    def solve(self, ridges: Sequence[float] = RIDGES, *, exact_mean: bool = False) -> Fitted:
        """The fit whose ridge does best on the held-out tokens (without any: on the fitted second moments).

        Args:
            ridges: strengths to try, in units of the mean second moment of a feature.
            exact_mean: scale the result so that its (weighted) mean over the fitted tokens is that of the targets.
                For a constant target this scaling *is* the constrained least-squares solution.

        Raises:
            InputError: no token was taken in, or no ridge makes the equations solvable.
        """
        held = self.held_out()
        found = self.candidates(ridges, exact_mean=exact_mean)
        scored = [(self._loss(right, held), ridge, right) for ridge, right in found.items()]
        loss, ridge, right = min(scored, key=lambda entry: entry[0])
        if loss != loss:
            raise InputError("the rank-one fit does not give finite numbers", remedy="use another layer")
        return Fitted(right, ridge, self.tokens)

    def candidates(self, ridges: Sequence[float] = RIDGES, *, exact_mean: bool = False) -> dict[float, torch.Tensor]:
        """For each ridge that can be solved, its fit: [width] fp32 on the CPU.

        Raises:
            InputError: no token was taken in, or no ridge makes the equations solvable.
        """
        if self._waiting:
            self._settle_basis()
        if self._gram is None or self._moment is None:
            raise InputError("there is no calibration token to fit on", remedy="give more calibration texts")
        unit = float(self._gram.diagonal().mean())
        found = {}
        for ridge in ridges:
            system = self._gram.clone()
            system.diagonal().add_(max(ridge * unit, torch.finfo(torch.float64).tiny))
            factor, failed = torch.linalg.cholesky_ex(system)
            if int(failed):
                continue
            solution = torch.cholesky_solve(self._moment[:, None], factor)[:, 0]
            reached = float(solution @ self._sum)
            if exact_mean and reached > 0:
                solution = solution * (self._target_sum / reached)
            if self._basis is not None:
                solution = self._basis.double() @ solution
            found[ridge] = solution.float().cpu()
        if not found:
            raise InputError(
                "the activations of this MLP are too degenerate for the rank-one fit",
                found=f"{self.tokens} tokens, a mean second moment of {unit:.3g}",
                remedy="give more calibration texts, or steer another layer",
            )
        return found

    def held_out(self) -> HeldOut:
        """The kept sample of held-out tokens; may be empty."""
        self._thin(force=True)
        if not self._kept:
            empty = torch.zeros(0, dtype=torch.float64)
            return HeldOut(torch.zeros(0, self.width), empty, empty)
        activations, goals, weights = (torch.cat(parts) for parts in zip(*self._kept, strict=True))
        return HeldOut(activations, goals, weights)

    def _add(self, activations: torch.Tensor, goal: torch.Tensor, weight: torch.Tensor) -> None:
        features = activations.double() if self._basis is None else (activations.float() @ self._basis).double()
        if self._gram is None:
            size = features.shape[1]
            self._gram = torch.zeros(size, size, dtype=torch.float64, device=features.device)
            self._moment = torch.zeros(size, dtype=torch.float64, device=features.device)
            self._sum = torch.zeros(size, dtype=torch.float64, device=features.device)
        assert self._moment is not None
        weighted = features * weight[:, None]
        self._gram.addmm_(weighted.T, features)
        self._moment += weighted.T @ goal
        self._sum += weighted.sum(dim=0)
        self._target_sum += float(weight @ goal)

    def _settle_basis(self) -> None:
        waiting, self._waiting = self._waiting, []
        sample = torch.cat([part for part, _goal, _weight in waiting])[: self.rank].float()
        # Attention sinks are larger than all else by orders of magnitude; only directions count here.
        sample = sample / sample.norm(dim=1, keepdim=True).clamp(min=1e-30)
        self._basis = torch.linalg.qr(sample.T).Q
        for part, goal, weight in waiting:
            self._add(part, goal, weight)

    def _keep(self, activations: torch.Tensor, goal: torch.Tensor, weight: torch.Tensor) -> None:
        self._kept.append((activations, goal, weight))
        self._keys.append(torch.rand(len(activations), generator=self._generator))
        self._thin()

    def _thin(self, *, force: bool = False) -> None:
        count = sum(len(keys) for keys in self._keys)
        if count <= self._capacity or (count < 2 * self._capacity and not force):
            return
        keys = torch.cat(self._keys)
        # Each token drew its key when it came, so which ones stay does not depend on how they were batched.
        chosen = keys.argsort()[: self._capacity].sort().values
        merged = tuple(torch.cat(parts)[chosen] for parts in zip(*self._kept, strict=True))
        self._kept, self._keys = [merged], [keys[chosen]]  # type: ignore[list-item]

    def _loss(self, right: torch.Tensor, held: HeldOut) -> float:
        if not len(held.targets):
            return 0.0 if self._gram is not None else float("nan")
        reached = held.activations.double() @ right.double()
        return float(((reached - held.targets).square() * held.weights).sum())
