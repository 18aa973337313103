"""Where the proof of an exact route fails, the next best one is written and proven; the proof stays what it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from patcher.build.job import Job
from patcher.errors import InputError
from patcher.patched.failed_route import FailedRoute
from patcher.progress.stage import warn
from patcher.routes.in_words import constant_in_words
from patcher.routes.plan import Plan
from patcher.verify.of_build import NotSteered

Done = TypeVar("Done")

_NEGLIGIBLE = 1e-5
"""Of a vector, what its constant may be off by and still explain no failure."""
REPORT_AT = "https://github.com/patch-model/patch-model/issues"


def until_proven(
    job: Job,
    plan: Plan,
    attempt: Callable[[Plan, Sequence[FailedRoute]], Done],
    choose: Callable[[Mapping[str, str]], Plan],
    *,
    otherwise: str = "",
) -> Done:
    """What ``attempt`` gives for ``plan``, or for the first of the next best exact routes whose proof holds.

    A route that the recipe forces is the only one that is tried, and so is a fitted one.

    Args:
        attempt: writes and proves a copy, told which routes failed before; nothing is left of one that fails.
        choose: plans the best exact route but for the named ones; the texts say why these are out.
        otherwise: what can be done where no route is left, if it is known.

    Raises:
        NotSteered: none holds; the text has the numbers of each.
        Whatever else ``attempt`` raises.
    """
    failed: list[FailedRoute] = []
    plans: list[Plan] = []
    while True:
        try:
            return attempt(plan, failed)
        except NotSteered as error:
            if not plan.exact:
                raise
            plans.append(plan)
            failed.append(_failed(plan, error))
            following = _following(plans, choose)
            if following is None or job.recipe.route != "auto":
                raise _none_holds(error, plans, failed, following, otherwise) from None
            warn(job.say, _going_on(failed[-1], following))
            plan = following


def _failed(plan: Plan, error: NotSteered) -> FailedRoute:
    entry = error.entry
    return FailedRoute.model_validate(
        {
            "name": plan.route,
            "cost": plan.cost,
            "stack": entry["stack"],
            "version": entry["version"],
            "checks": [check for check in entry["checks"] if check["passed"] is False],
        }
    )


def _following(plans: Sequence[Plan], choose: Callable[[Mapping[str, str]], Plan]) -> Plan | None:
    out = {plan.route: "its proof failed" for plan in plans}
    try:
        following = choose(out)
    except InputError:
        return None
    return None if following.route in out else following


def _going_on(failed: FailedRoute, following: Plan) -> str:
    return f"{failed.said}; the `{following.route}` route is tried now (run-time cost: {following.cost})"


def _is_short(plan: Plan) -> bool:
    """Whether it is known that what the plan adds is not quite the vector."""
    return plan.constant is not None and (plan.constant.worst is None or plan.constant.worst > _NEGLIGIBLE)


def _none_holds(
    error: NotSteered,
    plans: Sequence[Plan],
    failed: Sequence[FailedRoute],
    following: Plan | None,
    otherwise: str,
) -> NotSteered:
    """The refusal, of one route or of all; it asks for a report only where nothing that is known explains it."""
    problem, stock = error.problems[0], f"in stock {failed[-1].stack} {failed[-1].version}"
    message = problem.message
    if len(failed) > 1:
        message = f"no exact route for this edit is steered as a hook steers the base, {stock}"
    if following is not None:
        remedy = (
            f"nothing was written; the next best route is `{following.route}` (run-time cost: {following.cost}): write "
            f"`route: {following.route}`, or `route: auto`, which goes on with it by itself"
        )
    elif otherwise:
        remedy = f"nothing was written; {otherwise}"
    elif short := [plan for plan in plans if _is_short(plan)]:
        off = constant_in_words(short[0].constant)
        remedy = (
            f"nothing was written; the constant of the `{short[0].route}` route is {off}, which explains it: steer a "
            "later layer, where the residual stream is larger, or use a hook"
        )
    else:
        remedy = (
            f"nothing was written; report it at {REPORT_AT} with the recipe, the model's config.json and this message"
        )
    return NotSteered(
        message,
        where=problem.where,
        found="; ".join(f"`{route.name}`: {route.measured}" for route in failed),
        remedy=remedy,
        entry=error.entry,
    )
