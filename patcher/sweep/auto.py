"""`layer: auto` and `coefficient: auto`: a sweep inside the build."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from patcher.checkpoint.staging import check_output
from patcher.errors import CheckFailed
from patcher.recipe.rewriting import chosen_recipe
from patcher.recipe.schema import Recipe
from patcher.report.pictures.extra import can_draw
from patcher.sweep.files import write_results
from patcher.sweep.pipeline import sweep

Say = Callable[[str], None]
_KEPT = ("layers", "coefficients", "splits", "guard", "rule", "search", "recommended", "report", "random_control")
"""What the manifest keeps of a sweep; the whole of it stays in the sweep's own folder."""


def sweep_folder(output: Path) -> Path:
    """Where the sweep of a build keeps its results: beside the output."""
    return output.with_name(output.name + "-sweep")


def fill_in(
    recipe: Recipe,
    recipe_text: str,
    recipe_path: Path,
    output: Path,
    *,
    force: bool,
    cache: bool,
    say: Say,
    note: Say,
) -> tuple[Recipe, dict[str, Any]]:
    """Sweep, and fill in what was chosen.

    Returns:
        The recipe with numbers, and how they were chosen, for the manifest.

    Raises:
        CheckFailed: no cell within the guard does what the vector is for.
        InputError, OutsideError: see :func:`patcher.sweep.pipeline.sweep`; or the output is in the way.
    """
    check_output(output, force=force)
    folder = sweep_folder(output)
    found = sweep(recipe, recipe_path, folder, force=force, cache=cache, say=say, note=note)
    write_results(found, folder, recipe, recipe_text, recipe_path, pictures=can_draw(), say=say)
    if found.chosen is None:
        raise CheckFailed(
            "no layer and coefficient within the guard does what the vector is for",
            where=f"{recipe_path.name}: vectors.{found.vector}",
            found=f"the grid is in {folder / 'sweep.json'}",
            remedy="other pairs, a wider grid (sweep.layers, sweep.coefficients) or another guard (evaluate.guard); "
            "or choose yourself",
            code="sweep",
        )
    layer, coefficient = found.chosen
    say(f"chosen: layer {layer}, coefficient {coefficient:g}")
    chosen = chosen_recipe(recipe, found.vector, layer, coefficient)
    return chosen, {key: found.data[key] for key in _KEPT}
