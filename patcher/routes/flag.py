"""The flag route: a config key makes the stock class create the bias."""

from __future__ import annotations

from collections.abc import Sequence

from patcher.architectures.analysis import Architecture
from patcher.checkpoint.folder import CheckpointFolder
from patcher.routes.bias_slots import plan_slots, slots_of
from patcher.routes.plan import Plan
from patcher.routes.route import Route

NAME = "flag"


def plan(architecture: Architecture, layers: Sequence[int], checkpoint: CheckpointFolder | None) -> Plan:
    """Plan the flag, the biases that carry the vectors, and zeros for all others that it creates.

    Raises:
        NotApplicable: no flag creates the slot in one of the layers, or two layers need different flags.
    """
    slots = slots_of(architecture.flagged_slot, layers)
    return plan_slots(NAME, architecture, slots, checkpoint, stacks=architecture.stacks)


ROUTE = Route(NAME, plan, keeps_quantised=True)
