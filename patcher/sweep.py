"""The sweep, from a recipe to a layer and a coefficient. Read it top to bottom, as the build.

recipe -> base -> pairs in three parts -> directions at every layer -> cells -> the chosen one -> its report
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import patcher
from patcher.build import dry_run
from patcher.build_result import Clock, DryRun
from patcher.build_vectors import BaseRun
from patcher.capture.budget import token_budget
from patcher.capture.cache import capture_cache
from patcher.capture.cache_key import model_identity
from patcher.capture.logits import LogitsSource
from patcher.capture.memory import available_memory
from patcher.capture.model import load_tokenizer
from patcher.capture.opened import OpenedBase
from patcher.capture.reader import ResidualReader
from patcher.capture.resuming import ResumingModel
from patcher.checkpoint.prepare import prepared_base
from patcher.checkpoint.source import fetch
from patcher.checkpoint.staging import scratch_folder
from patcher.errors import InputError
from patcher.evaluate.details import Looked, look
from patcher.evaluate.of_build import batch_rows
from patcher.evaluate.sweep import choosing, materials
from patcher.evaluate.sweep.axes import (
    default_cells,
    grid_coefficients,
    grid_layers,
    shares_of,
    swept_vector,
)
from patcher.evaluate.sweep.cells import Bench, Cell, Column
from patcher.evaluate.sweep.geometry import geometry
from patcher.evaluate.sweep.record import CellRecord
from patcher.evaluate.sweep.reporting import Row, measure_rows, random_control, rows_for
from patcher.evaluate.sweep.results import behaviours, cell_json, random_grid
from patcher.evaluate.sweep.search import LARGE_GRID, measure_grid, within_guard
from patcher.recipe import Recipe
from patcher.vectors.finding import Direction, PreparedVector, find_directions, prepare_vectors, steering_vector
from patcher.verify.probes import PROBES

Say = Callable[[str], None]
FORMAT = 1
_MEMORY = 0.2
"""Of the free memory, for residuals that are kept, and as much again for the base's distributions."""


@dataclass(frozen=True)
class Swept:
    """A finished sweep.

    Attributes:
        data: the content of ``sweep.json``.
        vector: the index of the vector that was swept.
        chosen: the recommended layer and coefficient, or None.
    """

    data: dict[str, Any]
    vector: int
    chosen: tuple[int, float] | None


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

    Finished cells are kept in ``folder``; a sweep of the same recipe and model goes on where it was interrupted.

    Args:
        recipe: what is swept; :class:`patcher.recipe_evaluate.SweepSpec` says how.
        recipe_path: inputs are relative to it.
        folder: for the results; made if it is not there.
        force: start anew where the folder holds another sweep.
        cache: whether activations that were captured before are taken again.
        say: called with a line about what is going on.
        note: called with what ``-v`` shows.

    Raises:
        InputError: the recipe, the pairs or the folder is not usable.
        OutsideError: the disk, the memory or the Hub failed; finished cells are kept.
    """
    clock = Clock(dict.fromkeys(("load", "capture", "sweep", "report", "total"), 0.0))
    planned = dry_run(recipe, recipe_path, folder, say=say, writes=False)
    index = swept_vector(recipe)
    spec, where = recipe.vectors[index], f"{recipe_path.name}: vectors.{index}"
    layers = grid_layers(recipe, spec, planned.architecture.block_count, where)
    defaults = default_cells(planned.architecture.block_count)
    source = planned.source
    tokenizer = load_tokenizer(source.folder, trust_remote_code=recipe.trust_remote_code)
    prepared = _prepared(recipe, recipe_path, planned, index, layers, defaults, tokenizer)
    parts = materials.split(prepared, index, recipe, recipe_path.parent, tokenizer)
    if source.hub:
        say(f"downloading {source.name}")
        with clock.time("load"):
            source = fetch(source.name, source.revision, weights=True)
    with prepared_base(source, recipe, recipe_path.parent, folder, say) as base, scratch_folder(folder) as scratch:
        identity = model_identity(source, base.adapter, trust_remote_code=recipe.trust_remote_code)
        record = CellRecord(folder, materials.fingerprint(recipe, identity, parts), force=force)
        if len(record):
            say(f"{len(record)} finished cells are taken from {folder}")
        planned = replace(planned, source=source, prepared=parts.prepared)
        quiet: Say = note or (lambda _text: None)
        kept = capture_cache(enabled=cache)
        run = BaseRun(recipe, recipe_path, planned, base, scratch, clock, say, quiet, kept, identity)
        whole = _Sweep(recipe, recipe_path, planned, index, layers, defaults, parts, record, clock, say, quiet, run)
        data = run.run(whole.on)
    data["timings"] = clock.stop()
    best = data["recommended"]
    return Swept(data, index, None if best is None else (best["layer"], best["coefficient"]))


def _prepared(
    recipe: Recipe,
    recipe_path: Path,
    planned: DryRun,
    index: int,
    layers: Sequence[int],
    defaults: Mapping[tuple[int, float], str],
    tokenizer: Any,
) -> list[PreparedVector]:
    """The recipe's vectors, the swept one at every layer of the grid and of the defaults."""
    if planned.prepared[index].asked is not None:
        raise InputError(
            "a sweep needs contrast pairs that are there, and `method: persona` lets the model write them",
            where=f"{recipe_path.name}: vectors.{index}.method",
            remedy="build once with a fixed layer, then sweep a recipe whose `pairs` are the written responses",
        )
    wanted = sorted({*layers, *(layer for layer, _coefficient in defaults)})
    specs = list(recipe.vectors)
    steps = [layer for layer in wanted if layer >= 0]
    specs[index] = specs[index].model_copy(update={"layer": steps, "before_layer": None, "coefficient": 1.0})
    if -1 in wanted:
        # `before_layer: 0` is the only name of the embedding.
        specs[index] = specs[index].model_copy(
            update={"layer": None, "before_layer": [layer + 1 for layer in wanted if layer + 1 < _blocks(planned)]}
        )
    asked = recipe.model_copy(update={"vectors": specs})
    return prepare_vectors(asked, recipe_path.parent, recipe_path.name, tokenizer, _blocks(planned))


def _blocks(planned: DryRun) -> int:
    return planned.architecture.block_count


@dataclass
class _Sweep:
    """A sweep on an opened base."""

    recipe: Recipe
    recipe_path: Path
    planned: DryRun
    index: int
    layers: list[int]
    defaults: dict[tuple[int, float], str]
    parts: materials.Parts
    record: CellRecord
    clock: Clock
    say: Say
    note: Say
    run: BaseRun

    def on(self, opened: OpenedBase, reader: ResidualReader) -> dict[str, Any]:
        """Everything of ``sweep.json`` but the timings."""
        recipe, spec = self.recipe, self.recipe.vectors[self.index]
        with self.clock.time("capture"):
            neutral = [opened.tokenizer(text)["input_ids"] for text in PROBES]
            found = find_directions(
                self.parts.prepared, reader, recipe_folder=self.recipe_path.parent, neutral=neutral, progress=self.say
            )
        directions = {direction.layer: direction for direction in found.pop(self.index)}

        def vector_at(layer: int, coefficient: float) -> torch.Tensor:
            chosen = spec.model_copy(update={"coefficient": coefficient})
            return steering_vector(chosen, directions[layer]).values

        norms = {layer: direction.residual_norm for layer, direction in directions.items()}
        unit = {layer: vector_at(layer, 1.0) for layer in self.layers}
        coefficients = grid_coefficients(recipe, spec, shares_of(unit, norms))
        defaults = {cell: name for cell, name in self.defaults.items() if cell[0] in directions}
        others = materials.others(self.parts.prepared, self.index, found)
        source = self._source(opened)
        rows_each = batch_rows(recipe)
        measured = materials.gather(recipe, self.recipe_path.parent, self.parts, opened, self.index, rows_each)
        memory = int(_MEMORY * available_memory())
        choose = measured.choosing_bench(source, others, math.copysign(1.0, spec.factor), rows_each, memory)
        with self.clock.time("sweep"):
            cells = self._grid(choose, coefficients, vector_at, norms)
            accepted = self._accepted(choose)
            best = choosing.recommended(cells, accepted)
            chosen = None if best is None else (best.layer, best.coefficient)
            shown = best or max(cells, key=lambda cell: cell.effect)
            control = random_grid(choose, unit, shown.layer, coefficients, recipe.seed)
        with self.clock.time("report"):
            self.say("measuring the chosen cell on the pairs that were kept back")
            bench = measured.reporting_bench(choose, memory)
            rows = rows_for(chosen, vector_at, defaults, random_vectors=recipe.sweep.random_vectors, seed=recipe.seed)
            report = self._report(bench, rows, measured)
            details = self._details(opened, source, bench, chosen, vector_at, measured)
        return {
            "format": FORMAT,
            "tool_version": patcher.__version__,
            "model": self.planned.source.name,
            "architecture": self.planned.architecture.class_name,
            "blocks": _blocks(self.planned),
            "vector": spec.name,
            "method": spec.method,
            "scale": spec.scale,
            "expected_sign": int(choose.expected_sign),
            "seed": recipe.seed,
            "measure": choose.effect.measure,
            "splits": measured.splits,
            "layers": self.layers,
            "coefficients": coefficients,
            "guard": {
                "measure": "kl",
                "unit": "nats a token",
                "limit": recipe.evaluate.guard.kl,
                "perplexity": recipe.evaluate.guard.perplexity,
                "text": measured.neutral_name,
            },
            "rule": choosing.rule(recipe.evaluate.guard),
            "search": "halving" if self._halving(coefficients) else "grid",
            "grid": [cell_json(cell, accepted(cell)) for cell in cells],
            "baseline": measured.baseline(choose),
            "random_grid": control,
            "pareto": [{"layer": c.layer, "coefficient": c.coefficient} for c in choosing.pareto(cells)],
            "recommended": None if best is None else {"layer": best.layer, "coefficient": best.coefficient},
            "report": report,
            "random_control": random_control(report),
            "behaviours": behaviours(bench, rows, spec.name),
            **details,
            "geometry": geometry(*_activations({layer: directions[layer] for layer in self.layers})),
            "notes": [*self.parts.notes, *measured.notes],
        }

    def _source(self, opened: OpenedBase) -> LogitsSource:
        if opened.model is None:
            return opened.logits
        architecture = self.planned.architecture
        parameter = next(opened.model.parameters())
        device = torch.device("cpu") if parameter.device.type == "meta" else parameter.device
        return ResumingModel(
            opened.model,
            architecture.blocks,
            tokens=token_budget(architecture.config, device, parameter.dtype),
            memory=int(_MEMORY * available_memory()),
            note=self.note,
        )

    def _accepted(self, bench: Bench) -> Callable[[Cell], bool]:
        guard, base = self.recipe.evaluate.guard, bench.base_perplexity()
        return lambda cell: within_guard(guard, base, cell.damage, cell.perplexity)

    def _halving(self, coefficients: Sequence[float]) -> bool:
        search = self.recipe.sweep.search
        return search == "halving" or (search == "auto" and len(self.layers) * len(coefficients) > LARGE_GRID)

    def _grid(
        self,
        bench: Bench,
        coefficients: Sequence[float],
        vector_at: Callable[[int, float], torch.Tensor],
        norms: Mapping[int, float | None],
    ) -> list[Cell]:
        columns = [
            Column(layer, {value: vector_at(layer, value) for value in coefficients}, norms[layer])
            for layer in self.layers
        ]
        return measure_grid(
            bench,
            columns,
            self.record,
            halving=self._halving(coefficients),
            together=not isinstance(bench.source, ResumingModel),
            accepted=self._accepted(bench),
            progress=lambda done, total: self.say(f"sweeping: {done} of {total} cells"),
        )

    def _report(self, bench: Bench, rows: Sequence[Row], measured: materials.Materials) -> list[dict[str, Any]]:
        guard, base = self.recipe.evaluate.guard, bench.base_perplexity()
        return measure_rows(
            bench,
            rows,
            measured.prompting,
            lambda kl, perplexity: within_guard(guard, base, kl, perplexity),
            seed=self.recipe.seed,
        )

    def _details(
        self,
        opened: OpenedBase,
        source: LogitsSource,
        bench: Bench,
        chosen: tuple[int, float] | None,
        vector_at: Callable[[int, float], torch.Tensor],
        measured: materials.Materials,
    ) -> dict[str, Any]:
        if chosen is None:
            return {"kl_tokens": [], "shifted": [], "text_changes": [], "generations": [], "scores": None}
        steered = bench.with_others({chosen[0]: vector_at(*chosen)})
        looked = Looked(source, opened.model, self.planned.architecture.blocks, opened.tokenizer, opened.positions)
        return look(
            looked,
            self.recipe,
            self.recipe.vectors[self.index],
            {},
            steered,
            texts=measured.shown_texts(),
            neutral=bench.neutral.texts,
            batch_size=bench.batch_size,
            say=self.say,
        )


def _activations(
    directions: Mapping[int, Direction],
) -> tuple[dict[int, tuple[torch.Tensor, torch.Tensor]], dict[int, torch.Tensor]]:
    sides = {}
    for layer, direction in directions.items():
        if direction.read is not None:
            half = len(direction.read) // 2
            sides[layer] = (direction.read[:half], direction.read[half:])
    return sides, {layer: direction.values for layer, direction in directions.items()}
