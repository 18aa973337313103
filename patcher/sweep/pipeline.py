"""The sweep, from a recipe to a layer and a coefficient. Read it top to bottom, as the build.

recipe -> base -> pairs in three parts -> directions at every layer -> cells -> the chosen one -> its report
(what runs the base is in :mod:`patcher.sweep.on_base`)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from patcher.build.base_run import BaseRun
from patcher.build.job import Job
from patcher.build.planning import BuildPlan, plan_build, with_weights
from patcher.capture.model import require_tokenizer
from patcher.checkpoint.prepare import prepared_base
from patcher.errors import InputError
from patcher.recipe.schema import Recipe
from patcher.recipe.vector import VectorSpec
from patcher.sweep import materials
from patcher.sweep.axes import default_cells, grid_layers, swept_vector
from patcher.sweep.files import remove_results
from patcher.sweep.on_base import STAGES, SweepRun, Swept
from patcher.sweep.record import CellRecord, fingerprint, on_recorded_days, settings
from patcher.vectors.files.reading import VectorFile
from patcher.vectors.prepared import PreparedVector


def sweep(job: Job) -> Swept:
    """Measure every cell of the grid, choose one, and report it on pairs that were not used before.

    Finished cells are kept in the job's output. A sweep of the same recipe and model goes on where it was interrupted.
    One with other layers, coefficients, guard or prompts measures only the cells that are not there.

    Args:
        job: what is swept (:class:`patcher.recipe.evaluate.SweepSpec` says how), and the folder for the results, made
            if it is not there. With ``force`` a sweep starts anew where the folder holds another one.

    Raises:
        InputError: the recipe, the pairs or the folder is not usable.
        OutsideError: the disk, the memory or the Hub failed; finished cells are kept.
        KeyboardInterrupt: as it came, with a text that says what is kept.
    """
    index = swept_vector(job.recipe)
    if not job.force:
        job = replace(job, loaded=job.loaded.changed(vectors=on_recorded_days(job.output, job.recipe.vectors)))
    of_one_layer = replace(job, loaded=replace(job.loaded, recipe=_of_one_layer(job.recipe, index)))
    with job.clock.time("plan"):
        planned = plan_build(of_one_layer, writes=False)
    job = planned.settled(job)
    recipe, loaded, folder, say = job.recipe, job.loaded, job.output, job.say
    spec, where = recipe.vectors[index], loaded.place(f"vectors.{index}")
    blocks = planned.architecture.block_count
    layers, defaults = grid_layers(recipe, spec, blocks, where), default_cells(blocks, spec.factor)
    notes: list[str] = []
    if (file := planned.prepared[index].file) is not None:
        layers, defaults, notes = _in_file(file, layers, defaults, as_asked=recipe.sweep.layers != "auto")
    source = planned.source
    tokenizer = planned.tokenizer
    require_tokenizer(tokenizer, "effect and damage are measured on text", f"model: {source.name}")
    every = sorted({*layers, *(layer for layer, _coefficient in defaults)})
    prepared = _at_layers(planned, spec, index, every, where, notes)
    parts = materials.split(prepared, index, loaded, tokenizer)
    planned = replace(with_weights(job, planned), prepared=parts.prepared)
    base_as_it_is_read = prepared_base(planned.source, loaded, folder, say, planned.adapter, planned.reading.stripped)
    with job.clock.opening("load", base_as_it_is_read) as base:
        run = BaseRun.of(job, planned, base)
        depends = fingerprint(loaded, run.identity or planned.source.revision, parts, index)
        record = CellRecord(folder, depends, settings(recipe), force=job.force)
        if len(record):
            say(f"{len(record)} finished cells are taken from {folder}")
        if not record.same:
            remove_results(folder)
        try:
            data = run.run(SweepRun(job, planned, index, layers, defaults, parts, prepared[index], record).on)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; {len(record)} finished cells are kept in {folder}: the same command goes on from there"
            ) from None
    data["timings"] = job.clock.timings(STAGES)
    return Swept(data, index, recipe)


def _of_one_layer(recipe: Recipe, index: int) -> Recipe:
    """The recipe as it will be built: a route must be there for one of the layers, not for all of them at once."""
    specs = list(recipe.vectors)
    if isinstance(specs[index].layer, list) or isinstance(specs[index].before_layer, list):
        specs[index] = specs[index].model_copy(update={"layer": "auto", "before_layer": None})
    return recipe.model_copy(update={"vectors": specs})


def _at_layers(
    planned: BuildPlan, spec: VectorSpec, index: int, layers: Sequence[int], where: str, notes: Sequence[str]
) -> list[PreparedVector]:
    """The recipe's vectors, the swept one at every layer of the grid and of the defaults."""
    entry = planned.prepared[index]
    if entry.asked is not None:
        raise InputError(
            "a sweep needs contrast pairs that are there, and `method: persona` lets the model write them",
            where=f"{where}.method",
            remedy="give the vector a `layer` and a `coefficient` of its own, and build it",
        )
    swept = replace(entry, spec=spec).at_layers(layers, planned.architecture.block_count)
    if swept.file is not None:
        said = tuple(f"vector `{spec.name}`: {note}" for note in (*swept.file.said(layers), *notes))
        swept = replace(swept, notes=said)
    return [*planned.prepared[:index], swept, *planned.prepared[index + 1 :]]


def _in_file(
    file: VectorFile, layers: list[int], defaults: dict[tuple[int, float], str], *, as_asked: bool
) -> tuple[list[int], dict[tuple[int, float], str], list[str]]:
    """The layers of the grid and the defaults that a file has a vector for, and what is left out.

    Raises:
        InputError: it has none for a layer of the grid that was asked for, or for no layer at all.
    """
    refused: dict[int, InputError] = {}
    for layer in sorted({*layers, *(layer for layer, _coefficient in defaults)}):
        try:
            file.at(layer)
        except InputError as error:
            refused[layer] = error
    left, out = [layer for layer in layers if layer not in refused], [layer for layer in layers if layer in refused]
    if out and (as_asked or not left):
        raise refused[out[0]]
    notes = [f"the file has no vector for layers {', '.join(map(str, out))}, which the grid leaves out"] if out else []
    return left, {cell: name for cell, name in defaults.items() if cell[0] not in refused}, notes
