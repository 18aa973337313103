"""What is said of a route to people, in words that ``inspect``, a build and a card share. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from patcher.stacks.names import LABELS

NO_EPSILON = "exact, no epsilon"


class Constant(Protocol):
    """What :class:`patcher.routes.plan.ConstantError` and its record in ``steering.json`` have in common."""

    @property
    def epsilon(self) -> float: ...
    @property
    def set_for(self) -> float | None: ...
    @property
    def typical(self) -> float | None: ...
    @property
    def worst(self) -> float | None: ...
    @property
    def measured_on(self) -> str | None: ...


def constant_in_short(constant: Constant | None, *, exact: bool = True) -> str:
    """How far a route's constant is off, for a table."""
    if not exact:
        return "by its fit"
    if constant is None:
        return NO_EPSILON
    if constant.typical is None or constant.worst is None:
        return "not measured"
    return f"{percent(constant.typical)}, at most {percent(constant.worst)}"


def constant_in_words(constant: Constant | None) -> str:
    """How far the constant of an exact route is off, in a sentence's part."""
    if constant is None:
        return NO_EPSILON
    about = f"epsilon {constant.epsilon:.2g}"
    if constant.set_for is not None:
        about += f", set for a mean square of {constant.set_for:.2g}"
    if constant.typical is None or constant.worst is None:
        return (
            f"short by epsilon / (epsilon + the mean square of a token's residual stream); {about}; not measured here"
        )
    where = f", on {constant.measured_on}" if constant.measured_on else ""
    typical, worst = percent(constant.typical), percent(constant.worst)
    if constant.measured_on == "embedding rows":
        where += ", as if no block added anything; a build measures more, and sets it for that"
    return f"predicted to be off by {typical} of the vector, by at most {worst}{where} ({about})"


def percent(share: float) -> str:
    """A share as people read it; two digits count."""
    return f"{100 * share:.2g} %"


def route_in_words(
    name: str, cost: str | None, stacks: Mapping[str, str], constant: Constant | None, *, exact: bool
) -> str:
    """Another route in one line: its cost, who reads it, how far its constant is off."""
    read = {label: stacks.get(stack, "no") for stack, label in LABELS.items()}
    readers = ", ".join(
        label + (" (backend)" if how == "backend" else "") for label, how in read.items() if how != "no"
    )
    off = f"; constant {constant_in_short(constant)}" if constant is not None else ""
    kind = "exact" if exact else "fitted"
    return f"{name} ({kind}; run-time cost: {cost or 'not stated'}; read by {readers or 'no stack'}{off})"
