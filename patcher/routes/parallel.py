"""The parallel route: where attention and MLP read the same norm, the attention's output bias lands beside the MLP's.

In such a block (Cohere's family) both outputs are added to the residual stream at once, so a bias on the attention's
output projection is a constant shift of the residual after the block. A sequential block would feed it to its MLP; the
probe tells the two apart.
"""

from __future__ import annotations

from collections.abc import Sequence

from patcher.architectures.analysis import Architecture
from patcher.checkpoint.folder import CheckpointFolder
from patcher.routes.flag import plan_flags, slots_of
from patcher.routes.native import plan_existing
from patcher.routes.plan import NotApplicable, Plan
from patcher.stacks.names import TRANSFORMERS_ALONE

NAME = "parallel"
COST = "none"


def plan(architecture: Architecture, layers: Sequence[int], checkpoint: CheckpointFolder | None) -> Plan:
    """Plan the attention's output bias, created by a flag where it is not there.

    Raises:
        NotApplicable: the blocks are not parallel, or have no such bias.
    """
    slots = slots_of(architecture.attention_slot, layers)
    existing = {layer: slot for layer, slot in slots.items() if not slot.flags}
    if existing and len(existing) < len(slots):
        raise NotApplicable("some of the layers have the bias already, others need a flag for it")
    # The native classes of vLLM and llama.cpp leave the bias of these attentions out.
    if existing:
        return plan_existing(NAME, architecture, slots, checkpoint, stacks=TRANSFORMERS_ALONE)
    return plan_flags(NAME, architecture, slots, checkpoint, stacks=TRANSFORMERS_ALONE)
