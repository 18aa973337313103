"""Plans of biases that are constant shifts: of those that a class has, and of those that its config flags create."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from patcher.architectures.analysis import Architecture, Slot
from patcher.architectures.config_keys import stated
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.safetensors_file import FLOATS, TensorInfo, read_tensor
from patcher.routes.disk_names import existing_name, new_names, place_to_add, stored_tensors
from patcher.routes.plan import NotApplicable, Plan, TensorWrite, refuse_embedding


def slots_of(find: Callable[[int], tuple[Slot | None, str]], layers: Sequence[int]) -> dict[int, Slot]:
    """The slot of every layer.

    Raises:
        NotApplicable: a layer has none.
    """
    refuse_embedding(layers, ", which has no such bias")
    slots = {}
    for layer in layers:
        slot, reason = find(layer)
        if slot is None:
            raise NotApplicable(f"layer {layer}: {reason}")
        slots[layer] = slot
    return slots


def plan_slots(
    route: str,
    architecture: Architecture,
    slots: Mapping[int, Slot],
    checkpoint: CheckpointFolder | None,
    *,
    stacks: Mapping[str, str],
) -> Plan:
    """The plan for slots that the class has under its own config, or that flags create in it.

    Raises:
        NotApplicable: two layers need different flags, a bias that the class has is not stored or in another shape, or
            one is stored that it does not read without the flags.
    """
    first = next(iter(slots.values()))
    if any(dict(slot.flags) != dict(first.flags) for slot in slots.values()):
        raise NotApplicable("the layers need different flags")
    stored = stored_tensors(checkpoint)
    changes: dict[str, Any] = {}
    dropped: frozenset[str] = frozenset()
    if not first.flags:
        tensors = [_added(architecture, slot, stored) for slot in slots.values()]
        reason = "the class has this bias in every block, and a probe of this config found it a constant residual shift"
    else:
        tensors = _created(architecture, first.created, slots.values(), stored)
        changes = _changes(architecture, first.flags, checkpoint)
        dropped = _idle_zeros(stored or {}, [tensor.name for tensor in tensors])
        flags = ", ".join(f"{key}: {str(value).lower()}" for key, value in first.flags.items())
        reason = f"the config key `{flags}` makes the class create the bias; a probe found it a constant residual shift"
    return Plan(
        route=route,
        architecture=architecture.class_name,
        blocks=architecture.blocks,
        sites={layer: slot.site for layer, slot in slots.items()},
        tensors=tuple(tensors),
        stacks=stacks,
        reason=reason,
        config_changes=changes,
        dropped=dropped,
    )


def _added(architecture: Architecture, slot: Slot, stored: Mapping[str, TensorInfo] | None) -> TensorWrite:
    """An addition to the existing bias: added in fp32, rounded once."""
    try:
        name, dtype = place_to_add(slot.parameter, slot.shape, architecture, stored)
    except NotApplicable as finding:
        raise NotApplicable(f"layer {slot.layer}: {finding}") from None
    # Experts' biases differ, so in half precision each would round the vector another way, and the gain would depend
    # on the routing: they are written in fp32 instead.
    dtype = dtype if len(slot.shape) == 1 else "F32"
    spread = _spread(architecture, slot, stored)
    return TensorWrite(name, slot.parameter, "added", slot.layer, slot.factor, slot.shape, dtype, spread=spread)


def _spread(architecture: Architecture, slot: Slot, stored: Mapping[str, TensorInfo] | None) -> torch.Tensor | None:
    """What the vector is multiplied by first: the inverse of what the class multiplies the slot's entries by."""
    if slot.times is None or stored is None:
        return None
    name = existing_name(slot.times, architecture, stored)
    if name is None or stored[name].dtype not in FLOATS or stored[name].shape != slot.shape:
        raise NotApplicable(f"layer {slot.layer}: the checkpoint does not store `{slot.times}` as it is read")
    weight = read_tensor(stored[name]).float()
    if not bool((weight.abs() > 1e-6 * weight.abs().max()).all()):
        raise NotApplicable(f"layer {slot.layer}: `{slot.times}` has entries of zero: nothing comes through there")
    return 1.0 / weight


def _created(
    architecture: Architecture,
    created: Mapping[str, tuple[int, ...]],
    slots: Iterable[Slot],
    stored: Mapping[str, TensorInfo] | None,
) -> list[TensorWrite]:
    """The biases that carry the vectors, and zeros for all others that the flags create.

    vLLM leaves a missing one uninitialised, and then returns NaN.
    """
    carried = {slot.parameter: slot for slot in slots}
    names = new_names(created, architecture, stored)
    quantisation = architecture.quantisation
    # In F32 the vector survives every conversion exactly; a loader casts it to the model's dtype.
    carrier_dtype = "F32" if quantisation is None else quantisation.bias
    tensors = []
    for parameter, shape in created.items():
        name, sibling = names[parameter]
        slot = carried.get(parameter)
        if slot is not None:
            tensors.append(TensorWrite(name, parameter, "created", slot.layer, slot.factor, shape, carrier_dtype))
            continue
        beside = stored[sibling].dtype if stored is not None and sibling is not None else carrier_dtype
        tensors.append(TensorWrite.beside(name, parameter, shape, beside if beside in FLOATS else carrier_dtype))
    return tensors


def _idle_zeros(stored: Mapping[str, TensorInfo], names: Sequence[str]) -> frozenset[str]:
    """Biases of zero that are stored although the class has none, as some GPTQ checkpoints do; they are replaced.

    Raises:
        NotApplicable: one is not zero: the class leaves it out today, and would read it with the flag.
    """
    there = [name for name in names if name in stored]
    for name in there:
        if stored[name].dtype not in FLOATS or read_tensor(stored[name]).any():
            raise NotApplicable(f"the checkpoint stores `{name}`, which the class does not read without the flag")
    return frozenset(there)


def _changes(
    architecture: Architecture, flags: Mapping[str, Any], checkpoint: CheckpointFolder | None
) -> dict[str, Any]:
    """The flags, and what config.json calls them already (InternLM3: ``bias``); two spellings must not disagree."""
    stored = checkpoint.config if checkpoint is not None else {}
    spellings: Mapping[str, str] = stated(architecture.config, "attribute_map") or {}
    old = {alias: flags[name] for alias, name in spellings.items() if name in flags and alias in stored}
    return {**flags, **old}
