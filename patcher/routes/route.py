"""What a route is: a name, a function that plans it, and what every plan of it has in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from patcher.architectures.analysis import Architecture
from patcher.checkpoint.folder import CheckpointFolder
from patcher.routes.plan import FREE, NotApplicable, Plan

Planning = Callable[[Architecture, Sequence[int], CheckpointFolder | None], Plan]


@dataclass(frozen=True)
class Route:
    """A way to store an edit.

    Attributes:
        name: what a recipe's ``route``, ``inspect`` and ``steering.json`` call it.
        plan: architecture, layers (0-based; -1 is the embedding) and base (None: names on disk are the class's own) ->
            what would be written. It raises :class:`NotApplicable` with the reason where the route does not fit.
        cost: what any copy costs at run time, in words, as it is known before one is planned.
        fit: of a fitted route, what completes its plan on the loaded model (as the ``fit`` of the rank-one route does);
            None: the stock model computes exactly what the hook computes.
        keeps_quantised: it rewrites no weight of the base, so that it also serves one whose weights are quantised.
        wider: plans a copy that costs more, for what does not read the plain one; None where there is no other one.
        readers_of_wider: how many blocks that takes, and which stacks read it alone, as far as the registry knows.
        plan_lossless: where a plan's constant may be short (:attr:`Plan.constant`), what plans without that; or None.
    """

    name: str
    plan: Planning
    cost: str = FREE
    fit: Callable[..., Plan] | None = None
    keeps_quantised: bool = False
    wider: Callable[[Architecture, Sequence[int], CheckpointFolder | None], Plan | None] | None = None
    readers_of_wider: Callable[[Architecture], tuple[int, tuple[str, ...]] | None] | None = None
    plan_lossless: Planning | None = None

    @property
    def exact(self) -> bool:
        return self.fit is None

    def require_serves(self, architecture: Architecture) -> None:
        """Refuse a checkpoint that the route cannot keep as it is, before anything is planned.

        Raises:
            NotApplicable: its weights are quantised, and the route writes weights.
        """
        if architecture.quantisation is not None and not self.keeps_quantised:
            method = architecture.quantisation.method
            raise NotApplicable(f"the checkpoint is quantised ({method}), and this route does not keep it so")
