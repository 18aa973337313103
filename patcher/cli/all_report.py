"""What a person sees of all architectures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from patcher.cli.tables import HEADS, console_for, print_pairs, routes_table
from patcher.stacks.names import LABELS, STACKS

_FREE = "none"


def print_all(found: Sequence[Mapping[str, Any]]) -> None:
    """One line an architecture, and the counts.

    Args:
        found: from :func:`patcher.routes.all_architectures.inspect_all`.
    """
    console = console_for()
    table = routes_table("model type", "route", *HEADS)
    routes = []
    for one in found:
        best = one["routes"][0] if one["routes"] else None
        if best is None:
            table.add_row(one["model"], "none", style="dim")
            continue
        routes.append(best)
        # How many layers there are is the default config's matter.
        cost = re.sub(r" in \d+", "", best["cost"])
        stacks = (best["stacks"][stack] for stack in STACKS)
        table.add_row(one["model"], best["name"], "yes" if best["exact"] else "fitted", cost, *stacks)
    console.print(table)
    unseen = [(one["model"], one["why_none"]) for one in found if one["architecture"] is None and one["why_none"]]
    if unseen:
        console.print("[bold]could not be looked at[/]")
        print_pairs(console, [(name, _one_line(why)) for name, why in unseen])
        console.print()
    exact = [route for route in routes if route["exact"]]
    read = ", ".join(
        f"{head} {sum(route['stacks'][stack] != 'no' for route in routes)}" for stack, head in LABELS.items()
    )
    free = sum(route["cost"] == _FREE for route in exact)
    console.print(f"read by: {read}", soft_wrap=True)
    console.print(
        f"{len(found)} architectures: {len(exact)} exact, of which {free} at no run-time "
        f"cost; {len(routes) - len(exact)} only fitted; {len(found) - len(routes)} without a route",
        soft_wrap=True,
    )
    console.print("patch-model inspect MODEL_TYPE says more about one", style="dim")


def _one_line(problem: Mapping[str, Any]) -> str:
    return str(problem["message"]) + (f" ({problem['found']})" if problem["found"] else "")
