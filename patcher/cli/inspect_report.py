"""What a person sees of an inspection."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from patcher.architectures.analysis import Architecture
from patcher.cli.plan_report import said_of_plan, written_by
from patcher.cli.tables import HEADS, console_for, print_pairs, routes_table
from patcher.errors import Problem
from patcher.routes.in_words import constant_in_short
from patcher.routes.inspection import Inspection
from patcher.routes.plan import Plan
from patcher.routes.planner import Verdict
from patcher.stacks.names import STACKS, UNREAD

MOST_REASONS = 3


def print_inspection(found: Inspection) -> None:
    """The routes of one architecture, and what the chosen one would write."""
    console = console_for()
    assert found.architecture is not None
    count = found.architecture.block_count
    console.print(
        f"[bold]{found.architecture.class_name}[/] (model_type {_kind(found.architecture)}): "
        f"{count} block{'s' * (count > 1)}, hidden {found.architecture.hidden}; "
        f"steering {', '.join('the embedding' if layer < 0 else f'block {layer}' for layer in found.layers)}",
        soft_wrap=True,
    )
    planned = [verdict.plan for verdict in found.verdicts if verdict.plan is not None]
    if planned:
        console.print(_routes(found, planned))
    if found.chosen is not None:
        _print_chosen(console, found, found.chosen)
    elif found.why_none is not None:
        _print_none(console, found.why_none)
    others = [plan for plan in planned if found.chosen is None or plan.route != found.chosen.route]
    if others:
        console.print("\n[bold]what the others would write[/]")
        print_pairs(console, [(plan.route, _in_short(plan, found)) for plan in others])
    against = [verdict for verdict in found.verdicts if verdict.plan is None]
    if against:
        console.print("\n[bold]do not apply[/]")
        print_pairs(console, [(verdict.name, _why_not(verdict, found.layers)) for verdict in against])


def _kind(architecture: Architecture) -> str:
    inside = architecture.model_type
    return f"{architecture.checkpoint_type}, its text decoder {inside}" if architecture.wraps else inside


def _stacks(plan: Plan) -> dict[str, str]:
    return {**UNREAD, **plan.stacks}


def _cells(plan: Plan) -> list[str]:
    off = constant_in_short(plan.constant, exact=plan.exact)
    return ["yes" if plan.exact else "fitted", plan.cost, *(_stacks(plan)[stack] for stack in STACKS), off]


def _routes(found: Inspection, planned: Sequence[Plan]) -> Table:
    table = routes_table("route", *HEADS, "constant off by", "")
    for plan in planned:
        chosen = found.chosen is not None and plan.route == found.chosen.route
        only_allowed = not chosen and not plan.exact and found.best is not None and not found.best.exact
        mark = "[green]chosen[/]" if chosen else "with --no-exact" if only_allowed else ""
        table.add_row(plan.route, *_cells(plan), mark, style="bold" if chosen else "")
    return table


def _print_chosen(console: Console, found: Inspection, plan: Plan) -> None:
    console.print(f"[bold]{plan.route}[/] would write", end="")
    other = found.architecture is not None and plan.architecture != found.architecture.class_name
    console.print(f" (the copy is loaded as {plan.architecture})" if other else "", markup=False)
    for line in written_by(plan):
        console.print(f"  {line}", markup=False, soft_wrap=True)
    notes = [("note", note) for note in (*plan.warnings, *plan.advice)]
    print_pairs(console, [("cost", plan.cost), *said_of_plan(plan), ("why", plan.reason), *notes], indent=0)


def _print_none(console: Console, problem: Problem) -> None:
    # The list of routes that do not apply follows, so what was found is not said twice.
    console.print(f"[bold]no route[/]: {escape(problem.message)}", soft_wrap=True)
    if problem.remedy:
        console.print(f"  remedy: {problem.remedy}", markup=False, soft_wrap=True)


def _in_short(plan: Plan, found: Inspection) -> str:
    first = plan.carriers[0]
    parts = [f"{'adds to' if first.kind == 'added' else 'creates'} {first.name}"]
    more = len(plan.tensors) - 1
    if more:
        parts.append(f"{more} more tensor{'s' * (more > 1)}")
    if plan.renamed:
        parts.append(f"renames {len(plan.renamed)}")
    if plan.grown:
        parts.append(f"widens {len(plan.grown)}")
    if plan.config is not None:
        parts.append("a new config.json")
    if plan.config_changes:
        parts.append("config.json: " + ", ".join(plan.config_changes))
    if found.architecture is not None and plan.architecture != found.architecture.class_name:
        parts.append(f"loaded as {plan.architecture}")
    return "; ".join(parts)


def _why_not(verdict: Verdict, layers: Sequence[int]) -> str:
    # With one layer it stands above.
    why = verdict.why_not.replace(f"layer {layers[0]}: ", "") if len(layers) == 1 else verdict.why_not
    first, more = why.split("; ")[:MOST_REASONS], why.count("; ") + 1 - MOST_REASONS
    return "; ".join(first) + (f"; and {more} more (--json has them all)" if more > 0 else "")
