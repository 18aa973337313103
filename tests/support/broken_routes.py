"""Routes whose copies are written wrongly, so that their proof must fail."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch

from patcher.routes import apply
from patcher.routes.plan import Plan


def halved(tensor: torch.Tensor) -> torch.Tensor:
    return tensor / 2


def break_routes(
    monkeypatch: pytest.MonkeyPatch,
    names: Collection[str],
    spoil: Callable[[torch.Tensor], torch.Tensor] = halved,
) -> list[str]:
    """What these routes write for a vector is spoilt; gives the names of all routes that are written, as they are."""
    honest, written = apply.tensors_to_write, []

    def faulty(plan: Plan, *arguments: Any) -> Any:
        created, replaced = honest(plan, *arguments)
        written.append(plan.route)
        if plan.route in names:
            carriers = {tensor.name for tensor in plan.carriers}
            created = {name: spoil(tensor) if name in carriers else tensor for name, tensor in created.items()}
            replaced = {name: spoil(tensor) if name in carriers else tensor for name, tensor in replaced.items()}
        return created, replaced

    monkeypatch.setattr(apply, "tensors_to_write", faulty)
    return written
