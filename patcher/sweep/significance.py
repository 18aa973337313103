"""Whether effects are above zero, for one cell or for the best of many."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

LEVEL = 0.05
"""How often the test may say "above zero" of any cell at all where no cell does anything."""
FEWEST_ITEMS = math.ceil(math.log2(1 / LEVEL))
"""With fewer, even effects that are all positive come by chance more often than that."""
_EVERY_FLIP = 12
"""Up to so many items, all patterns of signs are tried."""
_FLIPS = 9_999


@dataclass(frozen=True)
class AboveZero:
    """What the test says of each cell.

    Attributes:
        lows: [cells], fp64: the lower end of the simultaneous one-sided 95 % interval of the mean; -inf where there are
            too few items.
        p: [cells], fp64: the p-value, corrected for the number of cells. It is at most ``LEVEL`` where ``lows`` is
            above 0.
    """

    lows: torch.Tensor
    p: torch.Tensor


def above_zero(effects: torch.Tensor, seed: int) -> AboveZero:
    """Test of all cells at once: the largest studentised mean under random signs (max-t).

    If a vector does nothing, the shift of an item is as likely up as down, so that the signs of the items may be
    turned. The same items are turned in all cells, which keeps how alike cells are: forty cells that do nearly the same
    cost little more than one. The chance of any false finding is at most ``LEVEL``, for any number of items and cells,
    where the shifts are symmetric about zero (Westfall & Young 1993, ch. 2; Romano & Wolf 2005; the signs: Fisher 1935,
    sec. 21). A bootstrap of few items would be too sure.

    The cutoff t* of the largest statistic gives the lower ends: mean - t* x standard error.

    Args:
        effects: [cells, items]: shifts of the same items, in all cells. What is not finite makes every p-value NaN.
        seed: of the signs, where there are more than 12 items; then 10,000 patterns are tried, and else all.
    """
    cells, count = effects.shape
    effects = effects.double()
    if not bool(effects.isfinite().all()):
        return AboveZero(torch.full((cells,), -math.inf).double(), torch.full((cells,), math.nan).double())
    means, errors = effects.mean(dim=1), effects.std(dim=1, correction=min(1, count - 1)) / math.sqrt(count)
    # Turning signs leaves the sum of squares as it is: this statistic orders as Student's t does, without its variance.
    scaled = effects / effects.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    found, largest = scaled.sum(dim=1), torch.cat([(part @ scaled.T).amax(dim=1) for part in _signs(count, seed)])
    p = torch.stack([(largest >= statistic - 1e-9).double().mean() for statistic in found])
    allowed = math.floor(LEVEL * len(largest))
    cutoff = float(largest.sort(descending=True).values[allowed])
    if count < FEWEST_ITEMS or count - cutoff**2 < 1e-9:
        return AboveZero(torch.full((cells,), -math.inf, dtype=torch.float64), p)
    times = cutoff * math.sqrt((count - 1) / (count - cutoff**2))
    lows = means - times * errors
    # Where every item is moved alike there is no error, and what is left is rounding.
    return AboveZero(torch.where(p <= LEVEL, lows.clamp(min=torch.finfo(torch.float64).tiny), lows.clamp(max=0)), p)


def _signs(count: int, seed: int) -> list[torch.Tensor]:
    """[patterns, items] of +1 and -1, in parts; what was measured, all +1, is among them."""
    if count <= _EVERY_FLIP:
        bits = torch.arange(2**count)[:, None] >> torch.arange(count)
        return [1.0 - 2.0 * (bits & 1).double()]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(2, (_FLIPS, count), generator=generator, dtype=torch.int8)
    parts = torch.tensor_split(drawn, 4)
    return [torch.ones(1, count, dtype=torch.float64), *(1.0 - 2.0 * part.double() for part in parts)]
