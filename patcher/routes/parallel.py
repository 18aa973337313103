"""The parallel route: where attention and MLP read the same norm, the attention's output bias lands beside the MLP's.

In such a block (Cohere's family) both outputs are added to the residual stream at once, so a bias on the attention's
output projection is a constant shift of the residual after the block. A sequential block would feed it to its MLP; the
probe tells the two apart.
"""

from __future__ import annotations

from collections.abc import Sequence

from patcher.architectures.analysis import Architecture
from patcher.checkpoint.folder import CheckpointFolder
from patcher.routes.bias_slots import plan_slots, slots_of
from patcher.routes.plan import Plan
from patcher.routes.route import Route
from patcher.stacks.names import TRANSFORMERS_ALONE

NAME = "parallel"


def plan(architecture: Architecture, layers: Sequence[int], checkpoint: CheckpointFolder | None) -> Plan:
    """Plan the attention's output bias, created by a flag where it is not there.

    Raises:
        NotApplicable: the blocks are not parallel, or have no such bias, or have it in some of the layers alone.
    """
    slots = slots_of(architecture.attention_slot, layers)
    # The native classes of vLLM and llama.cpp leave the bias of these attentions out.
    return plan_slots(NAME, architecture, slots, checkpoint, stacks=TRANSFORMERS_ALONE)


ROUTE = Route(NAME, plan)
