"""A tensor made of the slices of another one along an axis: some are moved, others are new and zeros.

Some models keep a part of every block in one tensor, as Gemma 4 does: ``embed_tokens_per_layer`` has as many columns a
block as its per-layer input is wide. It may be the largest tensor of all, so it is copied slice by slice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from patcher.checkpoint.pieces import Slices
from patcher.checkpoint.safetensors_file import TensorInfo
from patcher.checkpoint.safetensors_writer import NewTensor


@dataclass(frozen=True)
class SliceOrder:
    """Which slices a new tensor has.

    Attributes:
        axis: along which it is cut.
        stored: into how many slices the old one is cut, all of one width.
        order: for each slice of the new one, its place in the old one; None for zeros.
    """

    axis: int
    stored: int
    order: tuple[int | None, ...]

    def shape(self, old: tuple[int, ...]) -> tuple[int, ...]:
        """The new tensor's shape.

        Raises:
            ValueError: the old one cannot be cut so.
        """
        if not 0 <= self.axis < len(old) or old[self.axis] % self.stored:
            raise ValueError(f"{list(old)} is not {self.stored} slices along axis {self.axis}")
        return (*old[: self.axis], old[self.axis] // self.stored * len(self.order), *old[self.axis + 1 :])

    def of(self, old: torch.Tensor) -> torch.Tensor:
        """The new tensor, of one that lies in memory."""
        slices = old.chunk(self.stored, self.axis)
        zeros = torch.zeros_like(slices[0])
        return torch.cat([zeros if one is None else slices[one] for one in self.order], self.axis)

    def on_disk(self, info: TensorInfo, name: str) -> NewTensor:
        """The new tensor, of one that lies in a file.

        Raises:
            ValueError: that cannot be cut so.
        """
        shape, groups = self.shape(info.shape), math.prod(info.shape[: self.axis])
        piece = Slices(info.file, info.start, info.size // (groups * self.stored), self.stored, self.order, groups)
        return NewTensor(name, info.dtype, shape, piece)

    @property
    def back(self) -> SliceOrder:
        """What makes the old tensor of the new one."""
        places = {one: place for place, one in enumerate(self.order)}
        return SliceOrder(self.axis, len(self.order), tuple(places[one] for one in range(self.stored)))

    def as_json(self) -> dict[str, Any]:
        return {"axis": self.axis, "stored": self.stored, "order": list(self.order)}

    @classmethod
    def from_json(cls, stated: Mapping[str, Any]) -> SliceOrder:
        return cls(stated["axis"], stated["stored"], tuple(stated["order"]))
