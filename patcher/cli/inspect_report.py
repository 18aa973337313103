"""What a person sees of an inspection."""

from __future__ import annotations

from collections.abc import Sequence

from patcher.cli.report import console_for, empty_table, written_by
from patcher.routes.inspection import NO_STACK, Inspection
from patcher.routes.planner import ROUTES, STACKS


def print_inspection(found: Inspection) -> None:
    """The routes of one architecture, and what the chosen one would write."""
    console = console_for()
    assert found.architecture is not None
    console.print(
        f"[bold]{found.architecture.class_name}[/] (model_type {found.architecture.model_type}): "
        f"{found.architecture.block_count} blocks, hidden {found.architecture.hidden}; "
        f"steering {', '.join('the embedding' if layer < 0 else f'block {layer}' for layer in found.layers)}"
    )
    table = empty_table("route", "exact", "run-time cost", *STACKS, "")
    for finding in found.findings:
        plan, chosen = finding.plan, found.chosen is not None and finding.name == found.chosen.route
        if plan is None:
            exact = "yes" if ROUTES[finding.name].exact else "fitted"
            table.add_row(finding.name, exact, "", "", "", "", f"does not apply: {finding.why_not}", style="dim")
            continue
        stacks = {**NO_STACK, **plan.stacks}
        row = [finding.name, "yes" if plan.exact else "fitted", plan.cost, *(stacks[stack] for stack in STACKS)]
        table.add_row(*row, "[green]chosen[/]" if chosen else "applies", style="bold" if chosen else "")
    console.print(table)
    if found.chosen is None:
        console.print(found.why_none, markup=False, soft_wrap=True)
        return
    console.print(f"[bold]{found.chosen.route}[/]: {found.chosen.reason}", soft_wrap=True)
    if found.chosen.architecture != found.architecture.class_name:
        console.print(f"  the copy is loaded as {found.chosen.architecture}", markup=False)
    for line in written_by(found.chosen):
        console.print(f"  {line}", markup=False, soft_wrap=True)
    for warning in found.chosen.warnings:
        console.print(f"note: {warning}", markup=False, soft_wrap=True)


def print_all(found: Sequence[Inspection]) -> None:
    """One line an architecture, and the counts."""
    console = console_for()
    table = empty_table("model type", "class", "route", "exact", "run-time cost", *STACKS)
    for one in found:
        plan, kind = one.chosen, "" if one.architecture is None else one.architecture.class_name
        if plan is None:
            table.add_row(one.model, kind, f"none: {one.why_none.splitlines()[0]}", "", "", "", "", "", style="dim")
            continue
        stacks = {**NO_STACK, **plan.stacks}
        exact = "yes" if plan.exact else "fitted"
        table.add_row(one.model, kind, plan.route, exact, plan.cost, *(stacks[stack] for stack in STACKS))
    console.print(table)
    plans = [one.chosen for one in found if one.chosen is not None]
    same = [plan for plan in plans if plan.exact]
    console.print(
        f"{len(found)} architectures: {len(same)} exact, of which {sum(plan.free for plan in same)} at no run-time "
        f"cost; {len(plans) - len(same)} fitted; {len(found) - len(plans)} without a route"
    )
