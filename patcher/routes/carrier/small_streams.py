"""A plan is weighed on the residual stream that it will meet: its constant is set for it, or it is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from patcher.routes.plan import RESIDUAL_LIMIT, NotApplicable, Plan

_WORTH_A_WARNING = 1e-5
_WARNING = "what the inserted block adds to a typical token of the base is off by"


class ConstantTooShort(NotApplicable):
    """The constant of an inserted block would be off by more than the proof allows; the text says by how much."""


@dataclass(frozen=True)
class SmallStreams:
    """What is known of the residual stream at the steered layers before the copy is written.

    Attributes:
        moments: layer -> fp64 [tokens, 2], see :func:`patcher.routes.constant.moments_of`.
        expect: computes, from a plan whose constant is set, the largest difference of a log-probability from the
            hook's that it makes; None: not known yet.
        tolerance: of that difference.
    """

    moments: Mapping[int, torch.Tensor]
    expect: Callable[[Plan], float] | None = None
    tolerance: float = 1e-4

    def weighed(self, plan: Plan) -> Plan:
        """The plan, its constant set so that the largest error over the tokens is the smallest.

        Raises:
            ConstantTooShort: what is left would fail the proof.
        """
        if plan.constant is None:
            return plan
        constant = plan.constant.measured(self.moments, "captured activations", corrected=True)
        change = {layer: to / plan.constant.settings.get(layer, 1.0) for layer, to in constant.settings.items()}
        tensors = tuple(
            write if write.layer not in change else replace(write, factor=write.factor * change[write.layer])
            for write in plan.tensors
        )
        plan = replace(plan, tensors=tensors, constant=constant)
        assert constant.worst is not None
        if constant.worst > RESIDUAL_LIMIT:
            raise ConstantTooShort(f"its constant would be {constant.in_words()} (the limit is {RESIDUAL_LIMIT:g})")
        if constant.worst > _WORTH_A_WARNING:
            others = [line for line in plan.warnings if not line.startswith(_WARNING)]
            told = (
                f"{_WARNING} {constant.typical:.1g} of it, for some by {constant.worst:.1g}: its constant depends on "
            )
            told += f"the residual stream's mean square, and is set for {constant.set_for or math.inf:.2g}"
            plan = replace(plan, warnings=(*others, told))
        if self.expect is None:
            return plan
        expected = self.expect(plan)
        if not expected <= self.tolerance:
            raise ConstantTooShort(
                f"log-probabilities would differ from the hook's by {expected:.2g} (the limit is "
                f"{self.tolerance:.2g}), since its constant would be {constant.in_words()}"
            )
        return replace(plan, constant=replace(constant, expected=expected))
