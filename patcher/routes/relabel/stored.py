"""How a class stores a parameter: as one tensor, or experts one by one, each in one part or in two halves."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from patcher.architectures.analysis import Architecture
from patcher.architectures.model_class import as_saved, on_meta
from patcher.checkpoint.names import stored_name
from patcher.routes.plan import Reader


@dataclass(frozen=True)
class Experts:
    """Where the experts of a fused parameter [experts, rows, columns] lie on disk.

    Attributes:
        parts: for each expert the names of its parts, stacked row after row.
    """

    parts: tuple[tuple[str, ...], ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for expert in self.parts for name in expert)

    def read(self, read: Reader) -> torch.Tensor:
        """[experts, rows, columns] in the stored dtype."""
        return torch.stack([torch.cat([read(name) for name in expert]) for expert in self.parts])

    def in_checkpoint(self, stored: Collection[str], base_prefix: str) -> Experts | None:
        """The same under the names of a checkpoint; None where one is not there."""
        found = [[stored_name(name, stored, base_prefix) for name in expert] for expert in self.parts]
        if any(name is None for expert in found for name in expert):
            return None
        return Experts(tuple(tuple(str(name) for name in expert) for expert in found))


def experts_of(architecture: Architecture, parameter: str) -> Experts | None:
    """How the class stores a fused parameter in parts; None where it is stored whole, or in a way not understood."""
    shape = architecture.parameters.get(parameter, ())
    if len(shape) != 3:
        return None

    def look() -> list[list[str]]:
        # Numbers that say where they were: expert, and upper or lower row.
        tags = torch.arange(shape[0] * 4, dtype=torch.float32).reshape(shape[0], 2, 2)
        meta = on_meta(architecture.config, trust_remote_code=architecture.trust_remote_code)
        named = as_saved(meta, {parameter: tags}) or {}
        return _in_order(named, shape[0])

    found = architecture.once(("experts on disk", parameter), look, list[list[str]])
    return Experts(tuple(map(tuple, found))) if found else None


def _in_order(named: dict[str, torch.Tensor], experts: int) -> list[list[str]]:
    found: list[dict[int, str]] = [{} for _ in range(experts)]
    for name, tensor in named.items():
        flat: Sequence[float] = tensor.flatten().tolist()
        first = int(flat[0])
        if flat != [float(first + place) for place in range(len(flat))] or len(flat) not in (2, 4) or first % 2:
            return []
        found[first // 4][first % 4] = name
    parts = [[expert[place] for place in sorted(expert)] for expert in found]
    return parts if len({len(expert) for expert in parts}) == 1 and len(named) >= experts > 1 else []
