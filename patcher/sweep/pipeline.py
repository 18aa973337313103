"""The sweep, from a recipe to a layer and a coefficient. Read it top to bottom, as the build.

recipe -> base -> pairs in three parts -> directions at every layer -> cells -> the chosen one -> its report
(what runs the base is in :mod:`patcher.sweep.on_base`)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from patcher.build.base_run import BaseRun
from patcher.build.local import dry_run
from patcher.build.result import Clock, DryRun
from patcher.capture.cache.key import model_identity
from patcher.capture.cache.store import capture_cache
from patcher.capture.model import load_tokenizer
from patcher.checkpoint.prepare import prepared_base
from patcher.checkpoint.source import fetch
from patcher.checkpoint.staging import scratch_folder
from patcher.errors import InputError
from patcher.recipe.schema import Recipe, VectorSpec
from patcher.sweep import materials
from patcher.sweep.axes import default_cells, grid_layers, swept_vector
from patcher.sweep.files import remove_results
from patcher.sweep.fingerprint import fingerprint, settings
from patcher.sweep.on_base import Say, SweepRun, Swept
from patcher.sweep.record import CellRecord
from patcher.vectors.finding import PreparedVector
from patcher.vectors.layers import resolve_read_layer


def sweep(
    recipe: Recipe,
    recipe_path: Path,
    folder: Path,
    *,
    force: bool = False,
    cache: bool = True,
    say: Say = print,
    note: Say | None = None,
) -> Swept:
    """Measure every cell of the grid, choose one, and report it on pairs that were not used before.

    Finished cells are kept in ``folder``; a sweep of the same recipe and model goes on where it was interrupted, and
    one with other layers, coefficients, guard or prompts measures only the cells that are not there.

    Args:
        recipe: what is swept; :class:`patcher.recipe.evaluate.SweepSpec` says how.
        recipe_path: inputs are relative to it.
        folder: for the results; made if it is not there.
        force: start anew where the folder holds another sweep.
        cache: whether activations that were captured before are taken again.
        say: called with a line about what is going on.
        note: called with what ``-v`` shows.

    Raises:
        InputError: the recipe, the pairs or the folder is not usable.
        OutsideError: the disk, the memory or the Hub failed; finished cells are kept.
        KeyboardInterrupt: as it came, with a text that says what is kept.
    """
    clock = Clock(dict.fromkeys(("load", "capture", "sweep", "report", "total"), 0.0))
    index = swept_vector(recipe)
    planned = dry_run(_of_one_layer(recipe, index), recipe_path, folder, say=say, writes=False)
    spec, where = recipe.vectors[index], f"{recipe_path.name}: vectors.{index}"
    blocks = planned.architecture.block_count
    layers, defaults = grid_layers(recipe, spec, blocks, where), default_cells(blocks)
    source = planned.source
    tokenizer = load_tokenizer(source.folder, trust_remote_code=recipe.trust_remote_code)
    if tokenizer is None:
        raise InputError(
            "the model folder has no tokenizer, and effect and damage are measured on text",
            where=f"model: {source.name}",
            remedy="put the tokenizer's files into the model folder",
        )
    prepared = _at_layers(planned, spec, index, sorted({*layers, *(layer for layer, _coefficient in defaults)}), where)
    parts = materials.split(prepared, index, recipe, recipe_path.parent, tokenizer)
    if source.hub:
        say(f"downloading {source.name}")
        with clock.time("load"):
            source = fetch(source.name, source.revision, weights=True)
    with prepared_base(source, recipe, recipe_path.parent, folder, say) as base, scratch_folder(folder) as scratch:
        identity = model_identity(source, base.adapter, trust_remote_code=recipe.trust_remote_code)
        depends = fingerprint(recipe, recipe_path.parent, identity or source.revision, parts, index)
        record = CellRecord(folder, depends, settings(recipe), force=force)
        if len(record):
            say(f"{len(record)} finished cells are taken from {folder}")
        if not record.same:
            remove_results(folder)
        planned = replace(planned, source=source, prepared=parts.prepared)
        quiet: Say = note or (lambda _text: None)
        kept = capture_cache(enabled=cache)
        run = BaseRun(recipe, recipe_path, planned, base, scratch, clock, say, quiet, kept, identity)
        work = SweepRun(recipe, recipe_path.parent, planned, index, layers, defaults, parts, record, clock, say, quiet)
        try:
            data = run.run(work.on)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; {len(record)} finished cells are kept in {folder}: the same command goes on from there"
            ) from None
    data["timings"] = clock.stop()
    best = data["recommended"]
    return Swept(data, index, None if best is None else (best["layer"], best["coefficient"]))


def _of_one_layer(recipe: Recipe, index: int) -> Recipe:
    """The recipe as it will be built: a route must be there for one of the layers, not for all of them at once."""
    specs = list(recipe.vectors)
    if isinstance(specs[index].layer, list) or isinstance(specs[index].before_layer, list):
        specs[index] = specs[index].model_copy(update={"layer": "auto", "before_layer": None})
    return recipe.model_copy(update={"vectors": specs})


def _at_layers(
    planned: DryRun, spec: VectorSpec, index: int, layers: Sequence[int], where: str
) -> list[PreparedVector]:
    """The recipe's vectors, the swept one at every layer of the grid and of the defaults."""
    entry = planned.prepared[index]
    if entry.asked is not None:
        raise InputError(
            "a sweep needs contrast pairs that are there, and `method: persona` lets the model write them",
            where=f"{where}.method",
            remedy="build once with a fixed layer, then sweep a recipe whose `pairs` are the written responses",
        )
    blocks = planned.architecture.block_count
    reads = {layer: resolve_read_layer(spec, layer, blocks, where) for layer in layers}
    swept = replace(entry, spec=spec, layers=tuple(layers), read_layers=reads)
    return [*planned.prepared[:index], swept, *planned.prepared[index + 1 :]]
