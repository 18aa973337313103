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
    if fitted is None and architecture.does_not_run is not None:
        return _not_run(architecture, architecture.does_not_run)
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


def _not_run(architecture: Architecture, raised: str) -> InputError:
    """No route is sought in vain: the class fails by itself."""
    import transformers

    whole = f"stock {architecture.class_name} of transformers {transformers.__version__}"
    if "pixel_values" in raised or ("image" in raised and "has no attribute" not in raised):
        return InputError(
            f"{whole} runs no prompt of text alone: it needs an image, and no route is proven with one alone",
            found=raised,
            remedy="choose a model that takes text: patch-model inspect --all",
            code="no_route",
        )
    return InputError(
        f"{whole} does not run, without any edit (tried on a small random model of this config)",
        found=raised,
        remedy="run the base itself; where it fails as well, another release of transformers may run it",
        code="no_route",
    )
