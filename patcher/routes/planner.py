"""The planner: from an architecture and the layers to one route that serves every target.

The order is stated and the same for all. Exact routes come before fitted ones. Among exact ones, what the recipe
prefers decides (most stacks, no run-time cost, or the same model type), then the other two, then the order of
:data:`ROUTES`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from patcher.architectures.analysis import Architecture
from patcher.checkpoint.folder import CheckpointFolder
from patcher.errors import InputError
from patcher.routes import flag, native, parallel
from patcher.routes.carrier import route as carrier
from patcher.routes.carrier.small_streams import ConstantTooShort, SmallStreams
from patcher.routes.embedding import route as embedding
from patcher.routes.plan import FREE, NextBest, NotApplicable, Plan
from patcher.routes.rank_one import route as rank_one
from patcher.routes.refusal import no_route
from patcher.routes.relabel import route as relabel
from patcher.routes.route import Route
from patcher.routes.vllm_backend import through_backend
from patcher.stacks.names import LLAMA_CPP, STACKS, TRANSFORMERS, UNREAD, VLLM, demanded_stacks

Prefer = Literal["stacks", "free", "same_model_type"]
_NONE: Mapping[str, str] = {}


ROUTES: Mapping[str, Route] = {
    route.name: route
    for route in (
        native.ROUTE,
        flag.ROUTE,
        relabel.ROUTE,
        parallel.ROUTE,
        embedding.ROUTE,
        carrier.ROUTE,
        rank_one.ROUTE,
    )
}
"""Every route, in the order of preference among equals; a new route is one file or folder, and one line here."""


@dataclass(frozen=True)
class Verdict:
    """What a route can do here: a plan, or why there is none.

    Attributes:
        too_short: whether the residual stream is too small for it.
    """

    route: Route
    plan: Plan | None
    why_not: str = ""
    too_short: bool = False

    @property
    def name(self) -> str:
        return self.route.name

    def as_json(self) -> dict[str, Any]:
        """What ``inspect`` says of it."""
        said = {
            "name": self.name,
            "exact": self.route.exact,
            "cost": self.route.cost if self.plan is None else self.plan.cost,
            "stacks": UNREAD if self.plan is None else {**UNREAD, **self.plan.stacks},
            "why_not": self.why_not or None,
        }
        if self.plan is None:
            return said
        return {**said, "constant": None if self.plan.constant is None else self.plan.constant.as_json()}


def survey(
    architecture: Architecture,
    layers: Sequence[int],
    checkpoint: CheckpointFolder | None = None,
    *,
    targets: Sequence[str] = (TRANSFORMERS,),
    names: Sequence[str] | None = None,
    streams: SmallStreams | None = None,
) -> Iterator[Verdict]:
    """Every route in turn, planned when it is asked for: a plan that all ``targets`` read, or the reason against it.

    Args:
        streams: what plans are weighed on.
    """
    for name in ROUTES if names is None else names:
        route = ROUTES[name]
        try:
            route.require_serves(architecture)
            plan = _planned(route, architecture, layers, checkpoint, targets)
            try:
                plan = plan if streams is None else streams.weighed(plan)
            except ConstantTooShort as short:
                plan = _lossless(route, architecture, layers, checkpoint, targets, str(short))
            yield Verdict(route, plan)
        except NotApplicable as finding:
            yield Verdict(route, None, str(finding), isinstance(finding, ConstantTooShort))


def _lossless(
    route: Route,
    architecture: Architecture,
    layers: Sequence[int],
    checkpoint: CheckpointFolder | None,
    targets: Sequence[str],
    short: str,
) -> Plan:
    """The same route with a constant that is exact on any residual stream."""
    if route.plan_lossless is None:
        raise ConstantTooShort(short)
    try:
        other = replace(route, plan=route.plan_lossless, wider=None)
        plan = _planned(other, architecture, layers, checkpoint, targets)
    except NotApplicable as finding:
        raise ConstantTooShort(f"{short}; with an exact constant: {finding}") from None
    return replace(
        plan, advice=(*plan.advice, f"a block that is made otherwise is inserted: of the usual one, {short}")
    )


def _planned(
    route: Route,
    architecture: Architecture,
    layers: Sequence[int],
    checkpoint: CheckpointFolder | None,
    targets: Sequence[str],
) -> Plan:
    """The route's plan that all ``targets`` read; what costs more only where the plain one does not serve."""
    plan = route.plan(architecture, layers, checkpoint)
    try:
        return _serving(plan, architecture, targets)
    except NotApplicable as finding:
        unread = finding
    try:
        wider = None if route.wider is None else route.wider(architecture, layers, checkpoint)
        if wider is not None:
            return _serving(wider, architecture, targets)
    except NotApplicable as finding:
        raise NotApplicable(f"{unread}; with more blocks: {finding}") from None
    raise unread


def choose_route(
    architecture: Architecture,
    layers: Sequence[int],
    checkpoint: CheckpointFolder | None = None,
    *,
    targets: Sequence[str] | str = "auto",
    route: str = "auto",
    exact: bool = True,
    prefer: Prefer = "stacks",
    streams: SmallStreams | None = None,
    without: Mapping[str, str] = _NONE,
) -> Plan:
    """The best route that stores the edits and is read by every target.

    Args:
        architecture: the stock class under this config.
        layers: the blocks whose output is steered; -1 is the embedding.
        checkpoint: the base, for names on disk; None plans by the class's own names.
        targets: ``auto`` (transformers), or the stacks that must read the route.
        route: force one by name.
        exact: whether fitted routes are out of the question.
        prefer: what decides between exact routes.
        streams: the residual stream that the copy's constants are weighed on, where it is known.
        without: routes that are out of the question, and why.

    Raises:
        InputError: no route serves; the text names what is missing, route by route.
    """
    if route != "auto" and route not in ROUTES:
        raise InputError(f"unknown route `{route}`", where="route", remedy="known routes: auto, " + ", ".join(ROUTES))
    demanded = demanded_stacks(targets)
    too_short = False
    tried: dict[str, str] = dict(without)
    best: Plan | None = None
    free: Plan | None = None
    fitted: Plan | None = None
    for name in ROUTES if route == "auto" else [route]:
        if name in without:
            continue
        if best is not None and not _could_beat(ROUTES[name], best, architecture, prefer):
            continue
        verdict = next(survey(architecture, layers, checkpoint, targets=demanded, names=[name], streams=streams))
        if verdict.plan is None:
            tried[name], too_short = verdict.why_not, too_short or verdict.too_short
        elif not verdict.plan.exact:
            fitted = verdict.plan
        else:
            free = verdict.plan if free is None and verdict.plan.free else free
            if best is None or rank(verdict.plan, architecture, prefer) < rank(best, architecture, prefer):
                best = verdict.plan
    if best is not None:
        best = best if free is None or best.free else _with_alternative(best, free)
        return best if route != "auto" or min(layers) < 0 else _with_wider(best, architecture, demanded)
    if fitted is not None and not exact:
        return fitted
    raise no_route(
        architecture,
        layers,
        demanded,
        tried,
        fitted,
        too_short=too_short and max(layers) + 1 < architecture.block_count,
    )


def with_next_best(
    plan: Plan,
    architecture: Architecture,
    layers: Sequence[int],
    checkpoint: CheckpointFolder | None = None,
    *,
    targets: Sequence[str] | str = "auto",
    exact: bool = True,
    prefer: Prefer = "stacks",
    without: Mapping[str, str] = _NONE,
) -> Plan:
    """``plan``, and the route that :func:`choose_route` would take if it had not been for this one."""
    others = {**without, plan.route: "it is the one that is taken"}
    try:
        other = choose_route(
            architecture, layers, checkpoint, targets=targets, exact=exact, prefer=prefer, without=others
        )
    except InputError:
        return plan
    return replace(plan, next_best=NextBest.of(other))


def rank(plan: Plan, architecture: Architecture, prefer: Prefer) -> tuple[float, ...]:
    """The planner's order, smallest first."""
    read = sum(_reads(plan, stack) for stack in STACKS)
    native_in = sum(plan.stacks.get(stack) == "native" for stack in STACKS)
    other_type = plan.architecture != architecture.class_name
    return (not plan.exact, *_order(read, plan.free, other_type, native_in, plan.route, prefer))


def _order(read: int, free: bool, other_type: bool, native_in: int, route: str, prefer: Prefer) -> tuple[float, ...]:
    keys: dict[Prefer, float] = {"stacks": -read, "free": not free, "same_model_type": other_type}
    return (keys.pop(prefer), *keys.values(), -native_in, list(ROUTES).index(route))


def _reads(plan: Plan, stack: str) -> bool:
    return plan.stacks.get(stack, "no") != "no"


def _could_beat(route: Route, best: Plan, architecture: Architecture, prefer: Prefer) -> bool:
    """Planning proves things on tiny models, so a route that cannot win is not planned."""
    if not route.exact:
        return False
    # A route that costs something keeps the model type: no stack reads it that does not load the model.
    reach = len(STACKS) if route.cost == FREE else architecture.loaded_by
    ideal = best.free and best.architecture == architecture.class_name
    if ideal and sum(_reads(best, stack) for stack in STACKS) >= reach:
        return False
    at_best = _order(reach, route.cost == FREE, False, reach, route.name, prefer)
    return (not route.exact, *at_best) < rank(best, architecture, prefer)


def _serving(plan: Plan, architecture: Architecture, targets: Sequence[str]) -> Plan:
    """The plan if all targets read it, through vLLM's Transformers backend where its own class would not."""
    if architecture.quantisation is not None and not architecture.quantisation.llama_cpp:
        plan = replace(plan, stacks={**plan.stacks, LLAMA_CPP: "no"})
    in_place = plan.is_own_bias and plan.architecture == architecture.class_name
    # Beside quantised weights nothing but a bias of the class itself is known to reach the backend.
    if VLLM in targets and not _reads(plan, VLLM) and (architecture.quantisation is None or in_place):
        plan = through_backend(plan, architecture)
    unread = [stack for stack in targets if not _reads(plan, stack)]
    if unread:
        raise NotApplicable(f"{', '.join(unread)} does not read it for {plan.architecture}")
    if plan.stacks.get(VLLM) == "backend" and "backend" not in plan.reason:
        plan = replace(plan, reason=plan.reason + "; vLLM reads it through its Transformers backend")
    return plan


def _with_alternative(plan: Plan, free: Plan) -> Plan:
    lost = [stack for stack in STACKS if _reads(plan, stack) and not _reads(free, stack)]
    unread = f", which {' and '.join(lost)} would not read" if lost else ""
    note = f"`prefer: free` takes the `{free.route}` route at no run-time cost{unread}"
    return replace(plan, advice=(*plan.advice, note))


def _with_wider(plan: Plan, architecture: Architecture, targets: Sequence[str]) -> Plan:
    """The plan, with the advice that some stack would read another one that costs more."""
    for route in ROUTES.values():
        found = None if route.readers_of_wider is None else route.readers_of_wider(architecture)
        gained = [stack for stack in found[1] if not _reads(plan, stack)] if found is not None else []
        if found is None or not gained or (architecture.quantisation is not None and not route.keeps_quantised):
            continue
        wanted = ", ".join(stack for stack in STACKS if stack in targets or stack in gained)
        note = (
            f"`targets: [{wanted}]` takes the `{route.name}` route with {found[0]} blocks after each steered "
            f"one, which {' and '.join(gained)} would read as well ({found[0] * len(plan.sites)} more layers in "
            f"{architecture.block_count})"
        )
        return replace(plan, advice=(*plan.advice, note))
    return plan
