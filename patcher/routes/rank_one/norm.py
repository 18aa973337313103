"""A norm after the MLP: what an addition in front of it makes of the residual stream."""

from __future__ import annotations

import copy

import torch
from torch import nn

from patcher.errors import InputError

_STEPS = 8
_SIGNS = 16


class NormResponse:
    """The norm of one block, and one vector that its output is to gain.

    In front of a norm that multiplies by w, the direction v / w is the one that comes out as v. How much of it there
    must be depends on the token, since the norm divides by the size of what it is given.

    Args:
        norm: the module; a copy in fp32 is used.
        vector: [hidden]; what the residual stream is to gain.
        factor: residual gain per unit of the norm's output.

    Raises:
        InputError: the norm lets nothing through in one of the dimensions.
    """

    def __init__(self, norm: nn.Module, vector: torch.Tensor, factor: float) -> None:
        self.norm = copy.deepcopy(norm).float()
        self.device = next(norm.parameters()).device
        self.factor = factor
        self.vector = vector.float()
        self.spread = norm_spread(self.norm, len(vector))
        self.left = self.vector * self.spread / factor

    def gain(self, before: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
        """What the stream gains by ``amounts`` [tokens] of the direction before the norm; [tokens, hidden], on the CPU.

        Args:
            before: [tokens, hidden]; what the norm reads.
        """
        before, amounts = before.to(self.device).float(), amounts.to(self.device).float()
        with torch.no_grad():
            after = self.norm(before + amounts[:, None] * self.left.to(self.device))
            gained: torch.Tensor = self.factor * (after - self.norm(before))
        return gained.cpu()

    def best_amounts(self, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For each token the amount whose gain is closest to the vector, and how much a unit of it changes the gain.

        Returns:
            amounts [tokens] and weights [tokens] (squared sensitivity per |v|), fp64 on the CPU.
        """
        vector = self.vector.double()
        size = before.float().square().mean(dim=-1).sqrt().cpu().double().clamp(min=1e-12)
        amounts = size.clone()
        slope = torch.zeros(len(before), len(vector), dtype=torch.float64)
        for _step in range(_STEPS):
            # Small enough for the curve, large enough for fp32.
            ahead, behind = (self.gain(before, amounts + sign * 0.02 * size).double() for sign in (1, -1))
            slope = (ahead - behind) / (0.04 * size[:, None])
            rest = vector - self.gain(before, amounts).double()
            change = (slope * rest).sum(dim=-1) / slope.square().sum(dim=-1).clamp(min=1e-30)
            amounts = torch.minimum(torch.maximum(amounts + change, 0.5 * amounts), 2.0 * amounts)
            amounts = torch.minimum(amounts, 8 * size)
        return amounts, slope.square().sum(dim=-1) / vector.square().sum()


def norm_spread(norm: nn.Module, width: int) -> torch.Tensor:
    """1 / w of a norm that multiplies by w ([width] fp32), as it acts, whatever its weight is called or offset by.

    Raises:
        InputError: it lets nothing through in one of the dimensions.
    """
    parameter = next(norm.parameters())
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (_SIGNS, width), generator=generator).float().mul(2).sub(1)
    with torch.no_grad():
        probe = signs.to(parameter.device, parameter.dtype)
        weight = ((norm(probe) - norm(-probe)).float().cpu() / 2 * signs).mean(dim=0)
    if not bool((weight.abs() > 1e-6 * weight.abs().max()).all()):
        raise InputError("the norm after the MLP has weights of zero: what is added before it cannot come out")
    spread: torch.Tensor = 1 / weight
    return spread
