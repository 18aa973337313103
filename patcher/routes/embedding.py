"""The embedding route: an edit before block 0, added to every row of what the residual stream begins as."""

from __future__ import annotations

from collections.abc import Sequence

from patcher.architectures.analysis import Architecture
from patcher.capture.forward import EMBEDDING
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.safetensors_file import FLOATS
from patcher.routes.disk_names import existing_name
from patcher.routes.embedding_probe import UNTIED, EmbeddingSlot, find_embedding_slot
from patcher.routes.plan import NotApplicable, Plan, TensorWrite
from patcher.stacks.names import TRANSFORMERS_ALONE

NAME = "embedding"
COST = "none"


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
    name, dtype = _on_disk(slot, architecture, checkpoint)
    # Rows differ, so in half precision each would round the vector another way: they are written in fp32.
    tensors = [
        TensorWrite(
            name, slot.parameter, "added", EMBEDDING, slot.factor, slot.shape, "F32" if dtype in FLOATS else dtype
        )
    ]
    stacks = architecture.loads
    if slot.untied_from is not None:
        head = architecture.saved_names([slot.untied_from])[slot.untied_from]
        tensors.append(
            TensorWrite(
                head,
                slot.untied_from,
                "created",
                None,
                1.0,
                slot.shape,
                dtype,
                make=lambda read: read(name),
                holds=f"a copy of `{name}`, which the base ties to it",
            )
        )
        # Whether another stack takes a head of its own for this class has not been measured.
        stacks = TRANSFORMERS_ALONE
    return Plan(
        route=NAME,
        exact=True,
        cost=COST,
        architecture=architecture.class_name,
        blocks=architecture.blocks,
        sites={EMBEDDING: slot.parameter.rpartition(".")[0]},
        tensors=tuple(tensors),
        config_changes=UNTIED if slot.untied_from is not None else {},
        stacks=stacks,
        reason=f"`{slot.parameter}` is part of what enters block 0, and a probe found it a constant shift",
    )


def _on_disk(slot: EmbeddingSlot, architecture: Architecture, checkpoint: CheckpointFolder | None) -> tuple[str, str]:
    if checkpoint is None or checkpoint.is_bin:
        return architecture.saved_names([slot.parameter])[slot.parameter], "F32"
    name = existing_name(slot.parameter, architecture, checkpoint.tensors)
    if name is None:
        raise NotApplicable(f"the checkpoint does not store `{slot.parameter}`")
    info = checkpoint.tensors[name]
    if info.dtype not in FLOATS or info.shape != slot.shape:
        raise NotApplicable(f"`{name}` is stored as {info.dtype} {list(info.shape)}")
    return name, info.dtype
