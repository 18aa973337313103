"""What a build may spend on measuring, counted in full-depth passes of a token, as capturing is."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from patcher.capture.layout import distinct_tokens
from patcher.capture.meter import Meter
from patcher.vectors.prepared import PreparedVector

FLOOR = 2000.0
"""Full-depth passes: a vector of five pairs is measured too."""


def capture_tokens(prepared: Sequence[PreparedVector], blocks: int) -> float:
    """What the vectors' prompts cost to read, in full-depth passes; what they begin with alike counts once.

    It is told from the prompts, so that a build whose activations are in the cache measures as much as the first one;
    with `refit` of those that the measured vector is made of.
    """
    total = 0.0
    for entry in prepared:
        depth = max(entry.read_layers.values(), default=-1) + 1
        total += distinct_tokens([side.ids for side in entry.sides]) * depth / blocks
    return total


@dataclass
class Budget:
    """What may be spent, what was, and what was left out.

    Attributes:
        asked: `evaluate.budget`.
        capture: what reading activations costs.
        meter: counts what the model is run for.
        cuts: what was measured less of, or not at all, in words.
    """

    asked: float | Literal["full"]
    capture: float
    meter: Meter
    cuts: list[str] = field(default_factory=list)
    _began: float = field(init=False)
    _outside: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._began = self.meter.spent

    @property
    def full(self) -> bool:
        """Whether everything is measured."""
        return self.asked == "full"

    @property
    def allowed(self) -> float:
        """Full-depth passes; infinite where everything is measured."""
        return math.inf if self.asked == "full" else self.asked * max(self.capture, FLOOR)

    @property
    def spent(self) -> float:
        """Full-depth passes, without those that a recipe asks for by name."""
        return self.meter.spent - self._began - self._outside

    @property
    def left(self) -> float:
        """What may still be spent."""
        return max(0.0, self.allowed - self.spent)

    def reserved(self, share: float) -> float:
        """What is left for later of a part of the budget; nothing has to be where everything is measured."""
        return 0.0 if self.full else share * self.allowed

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """What is spent while this is open was asked for by name, and does not count."""
        before = self.meter.spent
        try:
            yield
        finally:
            self._outside += self.meter.spent - before

    def note(self) -> str | None:
        """What was cut, in one line, with the key that gives more; None where nothing was."""
        if not self.cuts:
            return None
        spent = f"{self.spent:,.0f} of {self.allowed:,.0f} tokens" if not self.full else "everything"
        left_out, last = ", ".join(self.cuts[:-1]), self.cuts[-1]
        return (
            f"measured within `evaluate.budget: {self.asked if self.full else f'{self.asked:g}'}` ({spent}): "
            f"{left_out}{' and ' if left_out else ''}{last}; `evaluate.budget: full` measures all of it"
        )

    def as_json(self) -> dict[str, Any]:
        """`evaluation.budget` of the manifest."""
        return {
            "asked": self.asked,
            "allowed": None if self.full else round(self.allowed, 1),
            "spent": round(self.spent, 1),
            "outside": round(self._outside, 1),
            "capture": round(self.capture, 1),
            "cut": self.cuts,
        }


def most_within(count: int, cost: Callable[[int], float], allowed: float, least: int = 1) -> int:
    """The most items, of ``count``, whose cost is within what is allowed, at least ``least``; it grows with them."""
    if count <= least or cost(count) <= allowed:
        return count
    fits, too_many = least, count
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if cost(middle) <= allowed else (fits, middle)
    return fits
