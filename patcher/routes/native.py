"""The native route: the class has the bias under its own config, and the vector is added to it."""

from __future__ import annotations

from collections.abc import Sequence

from patcher.architectures.analysis import Architecture
from patcher.checkpoint.folder import CheckpointFolder
from patcher.routes.bias_slots import plan_slots, slots_of
from patcher.routes.plan import Plan
from patcher.routes.route import Route

NAME = "native"


def plan(architecture: Architecture, layers: Sequence[int], checkpoint: CheckpointFolder | None) -> Plan:
    """Plan an addition to the existing bias of each layer: added in fp32, rounded once.

    Raises:
        NotApplicable: the class has no such bias in one of the layers, or the checkpoint does not store it.
    """
    slots = slots_of(architecture.native_slot, layers)
    return plan_slots(NAME, architecture, slots, checkpoint, stacks=architecture.stacks_of(slots.values()))


ROUTE = Route(NAME, plan, keeps_quantised=True)
