"""Tensors outside of the blocks that hold a part of every block: an inserted block makes them longer along an axis.

The axis is cut into as many slices as there are blocks. The base's blocks keep theirs, and the inserted one has zeros.
That the slices lie in this order, and that zeros do nothing, is what the stand-ins' proof finds or does not find.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from patcher.architectures.analysis import Architecture
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.slices import SliceOrder
from patcher.routes.carrier.insertion import Insertion
from patcher.routes.disk_names import place_to_add, stored_tensors
from patcher.routes.plan import NotApplicable


def grown_axis(old: Sequence[int], new: Sequence[int], insertion: Insertion) -> int | None:
    """The axis along which a shape has grown by the inserted blocks' slices, or None."""
    if len(old) != len(new):
        return None
    axes = [axis for axis, sizes in enumerate(zip(old, new, strict=True)) if sizes[0] != sizes[1]]
    if len(axes) != 1 or not has_grown(old[axes[0]], new[axes[0]], insertion):
        return None
    return axes[0]


def has_grown(old: int, new: int, insertion: Insertion) -> bool:
    """Whether a size is that of a slice, times the number of blocks, before and after."""
    return old > 0 and old % insertion.count == 0 and new == old // insertion.count * insertion.total


def grown_tensors(base: nn.Module, extended: nn.Module, insertion: Insertion, blocks: str) -> dict[str, SliceOrder]:
    """Tensor outside of the blocks -> the order of its slices, of all that have more of them in the extended class."""
    places = {insertion.moved(block): block for block in range(insertion.count)}
    order = tuple(places.get(place) for place in range(insertion.total))
    before, after = base.state_dict(), extended.state_dict()
    found = {}
    for name, tensor in before.items():
        if name.startswith(blocks + ".") or name not in after or after[name].shape == tensor.shape:
            continue
        axis = grown_axis(tensor.shape, after[name].shape, insertion)
        if axis is not None:
            found[name] = SliceOrder(axis, insertion.count, order)
    return found


def grown_on_disk(
    architecture: Architecture, grown: Mapping[str, SliceOrder], checkpoint: CheckpointFolder | None
) -> dict[str, SliceOrder]:
    """The same by the names under which this checkpoint stores them.

    Raises:
        NotApplicable: one is not stored, or not as floating-point numbers in the class's shape.
    """
    stored = stored_tensors(checkpoint)
    found = {}
    for name, order in grown.items():
        if name in architecture.aliases or name in architecture.aliases.values():
            raise NotApplicable(f"`{name}` has a part for each block, and is tied to another tensor")
        found[place_to_add(name, architecture.parameters[name], architecture, stored)[0]] = order
    return found
