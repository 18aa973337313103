"""`layer: auto` and `coefficient: auto`: a sweep inside the build."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from patcher.build.job import Job
from patcher.checkpoint.staging import check_output
from patcher.errors import CheckFailed
from patcher.progress.clock import Clock
from patcher.recipe.rewriting import chosen_recipe, lines_of
from patcher.report.pictures.drawing import can_draw
from patcher.sweep.files import write_results
from patcher.sweep.pipeline import sweep

_KEPT = (
    *("layers", "coefficients", "splits", "guard", "rule", "search", "compared", "chosen", "recommended", "reason"),
    *("best_default", "report", "random_control"),
)
"""What the manifest keeps of a sweep; the whole of it stays in the sweep's own folder."""


def fill_in(job: Job) -> tuple[Job, dict[str, Any]]:
    """Sweep into a folder beside the output, and fill in what was chosen.

    Args:
        job: of the build.

    Returns:
        The job with numbers, and how they were chosen, for the manifest.

    Raises:
        CheckFailed: the sweep recommends nothing; a fixed default that is confirmed is named.
        InputError, OutsideError: see :func:`patcher.sweep.pipeline.sweep`; or the output is in the way.
    """
    check_output(job.output, force=job.force)
    beside = job.output.with_name(job.output.name + "-sweep")
    sweeping = replace(job, output=beside, clock=Clock())
    with job.clock.time("sweep"):
        found = sweep(sweeping)
        write_results(found, sweeping, pictures=can_draw())
    if found.chosen is None:
        default = found.data["best_default"]
        named = default is not None and default["confirmed"]
        other = "other pairs, more of them, or a wider grid (sweep.layers, sweep.coefficients)"
        raise CheckFailed(
            "the sweep recommends no layer and coefficient",
            where=job.loaded.place(f"vectors.{found.vector}"),
            found=f"{found.data['reason']} The grid is in {sweeping.output / 'sweep.json'}",
            remedy=f"write the fixed default: {lines_of(default)}; or {other}" if named else other,
            code="sweep",
        )
    layer, coefficient = found.chosen
    job.say(f"chosen: layer {layer}, coefficient {coefficient:g}")
    chosen = replace(job.loaded, recipe=chosen_recipe(found.recipe, found.vector, layer, coefficient))
    return replace(job, loaded=chosen), {key: found.data[key] for key in _KEPT}
