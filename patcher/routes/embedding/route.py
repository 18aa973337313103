"""The embedding route: an edit before block 0, added to every row of what the residual stream begins as."""

from __future__ import annotations

from collections.abc import Sequence

from patcher.architectures.analysis import Architecture
from patcher.architectures.streams import stream_count
from patcher.capture.forward import EMBEDDING
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.safetensors_file import FLOATS
from patcher.routes.disk_names import place_to_add, stored_tensors
from patcher.routes.embedding.probe import find_embedding_slot
from patcher.routes.plan import NotApplicable, Plan, TensorWrite
from patcher.routes.route import Route
from patcher.stacks.names import TRANSFORMERS_ALONE

NAME = "embedding"


def plan(architecture: Architecture, layers: Sequence[int], checkpoint: CheckpointFolder | None) -> Plan:
    """Plan a norm's bias, learned positions or the input embedding; the latter is untied where it is the output head.

    Raises:
        NotApplicable: the edit is not before block 0, or nothing there holds a constant.
    """
    if EMBEDDING not in layers:
        raise NotApplicable("only an edit before block 0 (`before_layer: 0`) is one of the embedding")
    if len(layers) > 1:
        raise NotApplicable("an edit before block 0 needs a recipe of its own; patch the patched folder once more")
    slot, reason = find_embedding_slot(architecture)
    if slot is None:
        raise NotApplicable(reason)
    name, dtype = place_to_add(slot.parameter, slot.shape, architecture, stored_tensors(checkpoint))
    # Rows differ, so in half precision each would round the vector another way: they are written in fp32.
    wide = "F32" if dtype in FLOATS else dtype
    tensors = [TensorWrite(name, slot.parameter, "added", EMBEDDING, slot.factor, slot.shape, wide)]
    holds = f"a copy of `{name}`, which the base ties to it"
    for head, saved in architecture.saved_names(slot.created).items():
        tensors.append(TensorWrite.beside(saved, head, slot.shape, dtype, lambda read: read(name), holds))
    return Plan(
        route=NAME,
        architecture=architecture.class_name,
        blocks=architecture.blocks,
        sites={EMBEDDING: slot.site},
        tensors=tuple(tensors),
        # Whether another stack takes a head of its own for this class has not been measured.
        stacks=TRANSFORMERS_ALONE if slot.created else architecture.loads,
        reason=f"`{slot.parameter}` is part of what enters block 0, and a probe found it a constant shift",
        config_changes=slot.flags,
        streams=stream_count(architecture),
    )


ROUTE = Route(NAME, plan)
