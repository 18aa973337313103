"""What a person sees of a sweep: the grid, the chosen cell beside its controls, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from patcher.cli.seconds import seconds_line
from patcher.cli.tables import console_for, empty_table
from patcher.recipe.rewriting import lines_of

_NO_NUMBER = "no number"
_COLOURS = {"recommended": "bold green", "chosen": "bold", "random": "dim", "default": ""}


def print_sweep(data: Mapping[str, Any], folder: Path, *, to_stderr: bool, pictures: bool) -> None:
    """The report of a finished sweep."""
    console = console_for(to_stderr=to_stderr)
    _print_grid(data, console)
    _print_report(data, console)
    for note in data["notes"]:
        console.print(f"note: {note}", markup=False)
    console.print(f"[dim]{seconds_line(data['timings'])}[/]", soft_wrap=True)
    best = data["recommended"]
    if best is None:
        console.print("\nnothing recommended", style="bold")
    else:
        console.print(f"\nrecommended: [bold]{_place(best['layer'])}, coefficient {best['coefficient']:g}[/]")
    console.print(data["reason"], soft_wrap=True, markup=False)
    if best is not None:
        console.print(f"build it: patch-model {folder / 'recipe.yaml'}", soft_wrap=True, markup=False)
    elif (default := data["best_default"]) is not None and default["confirmed"]:
        console.print(f"the default, in the recipe: {lines_of(default)}", soft_wrap=True, markup=False)
    where = f"written: {folder}" + (f" (open {folder / 'report.html'})" if pictures else "")
    console.print(where, soft_wrap=True, markup=False)


def _print_grid(data: Mapping[str, Any], console: Console) -> None:
    coefficients = data["coefficients"]
    table = empty_table(f"effect on {data['splits']['choose']} choosing items", *(f"{c:g}" for c in coefficients))
    cells = {(cell["layer"], cell["coefficient"]): cell for cell in data["grid"]}
    best = data["recommended"]
    for layer in data["layers"]:
        shown = []
        for coefficient in coefficients:
            cell = cells[layer, coefficient]
            text = _shown(cell["effect"], "+.3f")
            if best is not None and (layer, coefficient) == (best["layer"], best["coefficient"]):
                text = f"[bold green]{text} *[/]"
            elif not cell["within_guard"]:
                text = f"[dim]({text})[/]"
            shown.append(text)
        table.add_row(_place(layer), *shown)
    console.print(table)
    limit = data["guard"]["limit"]
    if limit is not None:
        above = f"the upper end of the KL divergence on neutral text is above {limit:g} nats a token"
        console.print(f"in brackets: beyond the guard ({above})")
    console.print(f"rule: {data['rule']}", soft_wrap=True)


def _print_report(data: Mapping[str, Any], console: Console) -> None:
    measure = str(data["measure"]).replace("_", " ")
    table = empty_table(f"{measure}, {data['splits']['report']} items kept back", "value", "effect", "95 %", "KL", "")
    randoms = [row for row in data["report"] if row["kind"] == "random"]
    for row in data["report"]:
        if row["kind"] == "random":
            if row is randoms[0]:
                effects = [each["effect"] for each in randoms if each["effect"] is not None]
                damages = [each["damage"] for each in randoms if each["damage"] is not None]
                span = f"{min(effects):+.3f} to {max(effects):+.3f}" if effects else _NO_NUMBER
                damage = _shown(sum(damages) / len(damages) if damages else None, ".3g")
                table.add_row(f"{len(randoms)} random vectors of equal norm", "", span, "", damage, "", style="dim")
            continue
        place = "" if row["layer"] is None else f" ({_place(row['layer'])}, {row['coefficient']:+g})"
        base = row["kind"] == "base"
        table.add_row(
            row["name"] + (place if row["kind"] in ("recommended", "chosen", "negative", "default") else ""),
            _shown(row["value"], ".3f"),
            "" if base else _shown(row["effect"], "+.3f"),
            "" if base or row["low"] is None else f"{row['low']:+.3f} to {row['high']:+.3f}",
            "" if row["kind"] == "prompting" else _shown(row["damage"], ".3g"),
            "beyond the guard" if row["within_guard"] is False else "",
            style=_COLOURS.get(row["kind"], ""),
        )
    console.print(table)


def _place(layer: int) -> str:
    return "embedding" if layer < 0 else f"layer {layer}"


def _shown(value: float | None, digits: str) -> str:
    return _NO_NUMBER if value is None else format(value, digits)
