"""A sweep on an opened base: cells, the chosen one, its report, and what there is to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import patcher
from patcher.build.base_run import neutral_tokens
from patcher.build.job import Job
from patcher.build.planning import BuildPlan
from patcher.capture.memory import available_memory
from patcher.capture.opened import OpenedBase
from patcher.capture.reader import ResidualReader
from patcher.capture.resuming import ResumingModel
from patcher.disk.json_files import finite_or_null
from patcher.evaluate.details import NOTHING_SEEN, look
from patcher.evaluate.guard import within_guard
from patcher.recipe.schema import Recipe
from patcher.sweep import choosing, materials
from patcher.sweep.axes import grid_coefficients, shares_of
from patcher.sweep.cells import Cell, Column
from patcher.sweep.geometry import geometry
from patcher.sweep.record import CellRecord
from patcher.sweep.reporting import behaviours, cell_json, measure_rows, random_control, random_grid, rows_for
from patcher.sweep.search import is_halving, measure_grid, refined
from patcher.vectors.directions import steering_vector
from patcher.vectors.finding import find_directions

FORMAT = 1
STAGES = ("start", "plan", "load", "capture", "grid", "report", "pictures")
"""Of a sweep, whose seconds are told."""
_MEMORY = 0.2
"""Of the free memory, for the base's distributions."""


@dataclass(frozen=True)
class Swept:
    """A finished sweep.

    Attributes:
        data: the content of ``sweep.json``.
        vector: the index of the vector that was swept.
        recipe: that was swept, with the day that a chat template wrote into its prompts.
    """

    data: dict[str, Any]
    vector: int
    recipe: Recipe

    @property
    def chosen(self) -> tuple[int, float] | None:
        """The recommended layer and coefficient, or None."""
        best = self.data["recommended"]
        return None if best is None else (best["layer"], best["coefficient"])


@dataclass
class SweepRun:
    """Everything that is decided before the base is opened.

    Attributes:
        job: what is swept, and where to.
        planned: what was decided without the weights, with the pairs of ``parts``.
        index: of the vector that is swept.
        layers: of the grid, ascending.
        defaults: the fixed defaults: (layer, coefficient) -> what it is called.
        parts: the pairs, in three parts.
        record: finished cells.
    """

    job: Job
    planned: BuildPlan
    index: int
    layers: list[int]
    defaults: dict[tuple[int, float], str]
    parts: materials.Parts
    record: CellRecord

    def on(self, opened: OpenedBase, reader: ResidualReader) -> dict[str, Any]:
        """Everything of ``sweep.json`` but the timings."""
        job, recipe, spec = self.job, self.job.recipe, self.job.recipe.vectors[self.index]
        guard = recipe.evaluate.guard
        with job.clock.time("capture"):
            neutral = neutral_tokens(opened.tokenizer, opened.embeddings)
            found = find_directions(self.parts.prepared, reader, neutral=neutral, progress=job.say)
        directions = {direction.layer: direction for direction in found.pop(self.index)}

        def vector_at(layer: int, coefficient: float) -> torch.Tensor:
            chosen = spec.model_copy(update={"coefficient": coefficient})
            return steering_vector(chosen, directions[layer]).values

        norms = {layer: direction.residual_norm for layer, direction in directions.items()}
        unit = {layer: vector_at(layer, 1.0) for layer in self.layers}
        coefficients = grid_coefficients(recipe, spec, shares_of(unit, norms))
        others = materials.others(self.parts.prepared, self.index, found)
        memory = int(_MEMORY * available_memory())
        with job.clock.time("grid"):
            measured = materials.gather(job.loaded, self.parts, opened, self.index, others, memory)
        choose, bench = measured.choosing, measured.reporting
        halving = is_halving(recipe.sweep.search, len(self.layers) * len(coefficients))
        with job.stage("grid", "sweeping", unit="cells") as sweeping:

            def accepted(cell: Cell) -> bool:
                return within_guard(guard, choose.base_perplexity(cell.pairs), cell.damage, cell.perplexity)

            def measure(values: Sequence[float]) -> list[Cell]:
                columns = [
                    Column(layer, {value: vector_at(layer, value) for value in values}, norms[layer])
                    for layer in self.layers
                ]
                return measure_grid(
                    choose,
                    columns,
                    self.record,
                    halving=halving,
                    together=not isinstance(opened.logits, ResumingModel),
                    accepted=accepted,
                    progress=sweeping.at,
                )

            cells = measure(coefficients)
            if recipe.sweep.coefficients == "auto" and not halving:
                cells, coefficients = refined(cells, coefficients, measure, accepted)
            best = choosing.recommended(cells, accepted)
            chosen = None if best is None else (best.layer, best.coefficient)
            shown = best or choosing.strongest(cells)
            control = random_grid(choose, unit, shown.layer, coefficients, recipe.seed)
        with job.clock.time("report"):
            job.say("measuring the chosen cell on the pairs that were kept back")
            rows = rows_for(
                chosen, vector_at, self.defaults, random_vectors=recipe.sweep.random_vectors, seed=recipe.seed
            )
            within = partial(within_guard, guard, bench.base_perplexity())
            report = measure_rows(bench, rows, measured.prompting, within, seed=recipe.seed)
            details = NOTHING_SEEN
            if chosen is not None:
                steered, texts = bench.with_others({chosen[0]: vector_at(*chosen)}), bench.shown_texts()
                details = look(opened, recipe, spec, steered, job.say, texts=texts, neutral=bench.neutral.texts)
        data = {
            "format": FORMAT,
            "tool_version": patcher.__version__,
            "model": self.planned.source.name,
            "architecture": self.planned.architecture.class_name,
            "blocks": self.planned.architecture.block_count,
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
                "limit": guard.kl,
                "perplexity": guard.perplexity,
                "text": measured.neutral_name,
            },
            "rule": choosing.rule(guard),
            "search": "halving" if halving else "grid",
            "grid": [cell_json(cell, accepted(cell)) for cell in cells],
            "baseline": choose.baseline(),
            "random_grid": control,
            "pareto": [{"layer": c.layer, "coefficient": c.coefficient} for c in choosing.pareto(cells)],
            "recommended": None if best is None else {"layer": best.layer, "coefficient": best.coefficient},
            "report": report,
            "random_control": random_control(report),
            "behaviours": behaviours(report, bench.effect.count, spec.name),
            **details,
            "geometry": geometry(
                {layer: sides for layer in self.layers if (sides := directions[layer].sides) is not None},
                {layer: directions[layer].values for layer in self.layers},
            ),
            "notes": [*(self.parts.notes if measured.on_pairs else self._of_files()), *measured.notes],
        }
        cleaned: dict[str, Any] = finite_or_null(data)
        return cleaned

    def _of_files(self) -> list[str]:
        """What was read of vector files."""
        return [note for entry in self.parts.prepared if entry.file is not None for note in entry.notes]
