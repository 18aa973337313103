"""The flag route: a config key makes the stock class create the bias.

Every tensor that the key creates is written: vLLM leaves a missing one uninitialised, and then returns NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from patcher.architectures.analysis import Architecture, Slot
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.safetensors_file import FLOATS, TensorInfo, read_tensor
from patcher.routes.disk_names import new_names
from patcher.routes.plan import NotApplicable, Plan, TensorWrite

NAME = "flag"
COST = "none"


def plan(architecture: Architecture, layers: Sequence[int], checkpoint: CheckpointFolder | None) -> Plan:
    """Plan the flag, the biases that carry the vectors, and zeros for all others that it creates.

    Raises:
        NotApplicable: no flag creates the slot in one of the layers, or two layers need different flags.
    """
    slots = slots_of(architecture.flagged_slot, layers)
    return plan_flags(NAME, architecture, slots, checkpoint, stacks=architecture.stacks)


def slots_of(find: Callable[[int], tuple[Slot | None, str]], layers: Sequence[int]) -> dict[int, Slot]:
    """The slot of every layer.

    Raises:
        NotApplicable: a layer has none.
    """
    slots = {}
    for layer in layers:
        if layer < 0:
            raise NotApplicable("an edit before block 0 belongs to the embedding, which has no such bias")
        slot, reason = find(layer)
        if slot is None:
            raise NotApplicable(f"layer {layer}: {reason}")
        slots[layer] = slot
    return slots


def plan_flags(
    route: str,
    architecture: Architecture,
    slots: Mapping[int, Slot],
    checkpoint: CheckpointFolder | None,
    *,
    stacks: Mapping[str, str],
) -> Plan:
    """The plan for slots that config flags create.

    Raises:
        NotApplicable: two layers need different flags, or a bias is stored already that the class does not read.
    """
    first = next(iter(slots.values()))
    if any(dict(slot.flags) != dict(first.flags) for slot in slots.values()):
        raise NotApplicable("the layers need different flags")

    carried = {slot.parameter: slot for slot in slots.values()}
    stored = checkpoint.tensors if checkpoint is not None and not checkpoint.is_bin else None
    names: Mapping[str, tuple[str, str | None]] = (
        new_names(first.created, architecture, stored)
        if stored is not None
        else {parameter: (name, None) for parameter, name in architecture.saved_names(first.created).items()}
    )
    quantisation = architecture.quantisation
    # In F32 the vector survives every conversion exactly; a loader casts it to the model's dtype.
    carrier_dtype = "F32" if quantisation is None else quantisation.bias
    tensors = []
    for parameter, shape in first.created.items():
        name, sibling = names[parameter]
        beside = stored[sibling].dtype if stored is not None and sibling is not None else carrier_dtype
        zero_dtype = beside if beside in FLOATS else carrier_dtype
        carrier = carried.get(parameter)
        tensors.append(
            TensorWrite(name, parameter, "created", carrier.layer, carrier.factor, shape, carrier_dtype)
            if carrier is not None
            else TensorWrite(name, parameter, "created", None, 1.0, shape, zero_dtype)
        )
    flags = ", ".join(f"{key}: {str(value).lower()}" for key, value in first.flags.items())
    return Plan(
        route=route,
        exact=True,
        cost=COST,
        architecture=architecture.class_name,
        blocks=architecture.blocks,
        sites={layer: slot.site for layer, slot in slots.items()},
        tensors=tuple(tensors),
        config_changes=_changes(architecture, first.flags, checkpoint),
        stacks=stacks,
        dropped=_idle_zeros(stored or {}, [tensor.name for tensor in tensors]),
        reason=f"the config key `{flags}` makes the class create the bias; a probe found it a constant residual shift",
    )


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
    spellings: Mapping[str, str] = getattr(architecture.config, "attribute_map", None) or {}
    old = {alias: flags[name] for alias, name in spellings.items() if name in flags and alias in stored}
    return {**flags, **old}
