"""The native route: the class has the bias under its own config, and the vector is added to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from patcher.architectures.analysis import Architecture, Slot
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.safetensors_file import FLOATS
from patcher.routes.disk_names import existing_name
from patcher.routes.flag import slots_of
from patcher.routes.plan import NotApplicable, Plan, TensorWrite

NAME = "native"
COST = "none"


def plan(architecture: Architecture, layers: Sequence[int], checkpoint: CheckpointFolder | None) -> Plan:
    """Plan an addition to the existing bias of each layer: added in fp32, rounded once.

    Raises:
        NotApplicable: the class has no such bias in one of the layers, or the checkpoint does not store it.
    """
    slots = slots_of(architecture.native_slot, layers)
    stacks = architecture.stacks_of(slots.values())
    return plan_existing(NAME, architecture, slots, checkpoint, stacks=stacks)


def plan_existing(
    route: str,
    architecture: Architecture,
    slots: Mapping[int, Slot],
    checkpoint: CheckpointFolder | None,
    *,
    stacks: Mapping[str, str],
) -> Plan:
    """The plan for slots that the class has under its own config.

    Raises:
        NotApplicable: the checkpoint does not store one of them, or in another shape.
    """
    tensors, sites = [], {}
    for layer, slot in slots.items():
        name, dtype = architecture.saved_names([slot.parameter])[slot.parameter], "F32"
        if checkpoint is not None and not checkpoint.is_bin:
            stored = existing_name(slot.parameter, architecture, checkpoint.tensors)
            if stored is None:
                raise NotApplicable(f"layer {layer}: the checkpoint does not store `{slot.parameter}`")
            info = checkpoint.tensors[stored]
            if info.dtype not in FLOATS or info.shape != slot.shape:
                raise NotApplicable(f"layer {layer}: `{stored}` is stored as {info.dtype} {list(info.shape)}")
            name, dtype = stored, info.dtype
            if len(slot.shape) > 1:
                # Experts' biases differ, so in half precision each would round the vector another way, and the gain
                # would depend on the routing: they are written in fp32 instead.
                dtype = "F32"
        tensors.append(TensorWrite(name, slot.parameter, "added", layer, slot.factor, slot.shape, dtype))
        sites[layer] = slot.site
    return Plan(
        route=route,
        exact=True,
        cost=COST,
        architecture=architecture.class_name,
        blocks=architecture.blocks,
        sites=sites,
        tensors=tuple(tensors),
        config_changes={},
        stacks=stacks,
        reason="the class has this bias in every block, and a probe of this config found it a constant residual shift",
    )
