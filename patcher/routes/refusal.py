"""The refusal of an edit that no route of an architecture can store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from patcher.architectures.analysis import Architecture
from patcher.errors import InputError
from patcher.routes.plan import Plan
from patcher.stacks.names import TRANSFORMERS


def no_route(
    architecture: Architecture,
    layers: Sequence[int],
    targets: Sequence[str],
    tried: Mapping[str, str],
    fitted: Plan | None,
    *,
    too_short: bool = False,
) -> InputError:
    """What is said where there is none, or only a fitted one.

    Args:
        tried: route -> why it does not serve.
        fitted: the plan of a fitted route, where there is one.
        too_short: whether a carrier's constant was too short here, and a later layer could do.
    """
    found = "; ".join(f"{name}: {why}" for name, why in tried.items())
    where = "layers " + ", ".join(map(str, layers))
    if fitted is not None:
        return InputError(
            f"{architecture.class_name} (model_type `{architecture.model_type}`) has no exact route for this edit, "
            f"only the fitted `{fitted.route}`",
            where=where,
            found=found,
            remedy=("steer a later layer, where the residual stream is larger. Or " if too_short else "")
            + "to allow it, add the line `exact: false` to the recipe; what it is off by is measured and reported",
            code="exact",
        )
    remedy = "steer it with a hook, or choose a model that has a route: patch-model inspect --all"
    if architecture.quantisation is not None:
        remedy = "use the unquantised version of this model; where that has only a fitted route, add `exact: false`"
    others = [stack for stack in targets if stack != TRANSFORMERS]
    if any("does not read it" in why for why in tried.values()) and others:
        remedy = f"take {', '.join(others)} out of `targets`"
    elif too_short:
        remedy = "steer a later layer, where the residual stream is larger, or use a hook"
    return InputError(
        f"{architecture.class_name} (model_type `{architecture.model_type}`) has no route for this edit",
        where=where,
        found=found,
        remedy=remedy,
        code="no_route",
    )
