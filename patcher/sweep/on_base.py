"""A sweep on an opened base: cells, the chosen one, its report, and what there is to look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

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
from patcher.sweep.axes import grid_coefficients, may_be_chosen, shares_of
from patcher.sweep.cells import Cell, CellBench, Column, upper_kl
from patcher.sweep.confirming import best_of_defaults, decide, told_apart
from patcher.sweep.geometry import geometry
from patcher.sweep.record import CellRecord
from patcher.sweep.reporting import behaviours, cell_json, measure_rows, random_control, random_grid, rows_for
from patcher.sweep.search import is_halving, measure_grid, refined
from patcher.sweep.vectors import SweptDirections
from patcher.vectors.prepared import PreparedVector

FORMAT = 2
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
        as_built: the swept vector as a build makes it, at every layer of the grid and of the defaults.
        record: finished cells.
    """

    job: Job
    planned: BuildPlan
    index: int
    layers: list[int]
    defaults: dict[tuple[int, float], str]
    parts: materials.Parts
    as_built: PreparedVector
    record: CellRecord

    def on(self, opened: OpenedBase, reader: ResidualReader) -> dict[str, Any]:
        """Everything of ``sweep.json`` but the timings."""
        job, recipe, spec = self.job, self.job.recipe, self.job.recipe.vectors[self.index]
        guard = recipe.evaluate.guard
        with job.clock.time("capture"):
            neutral = neutral_tokens(opened.tokenizer, opened.embeddings)
            found = SweptDirections.read(self.parts, self.index, self.as_built, reader, neutral, job.say)
        norms = {layer: direction.residual_norm for layer, direction in found.of_cells.items()}
        unit = {layer: found.for_cells(layer, 1.0) for layer in self.layers}
        coefficients = grid_coefficients(recipe, spec, shares_of(unit, norms))
        others = materials.others(self.parts.prepared, self.index, found.others)
        memory = int(_MEMORY * available_memory())
        with job.clock.time("grid"):
            measured = materials.gather(job.loaded, self.parts, opened, self.index, others, memory)
        choose, bench = measured.choosing, measured.reporting
        halving = is_halving(recipe.sweep.search, len(self.layers) * len(coefficients))
        with job.stage("grid", "sweeping", unit="cells") as sweeping:

            def accepted(cell: Cell) -> bool:
                return within_guard(guard, choose.base_perplexity(cell.pairs), cell.guarded, cell.perplexity)

            def eligible(cell: Cell) -> bool:
                return may_be_chosen(recipe, spec, cell.coefficient) and accepted(cell)

            def measure(places: Mapping[int, Sequence[float]], halving: bool = halving) -> list[Cell]:
                columns = [
                    Column(layer, {value: found.for_cells(layer, value) for value in values}, norms[layer])
                    for layer, values in sorted(places.items())
                ]
                return measure_grid(
                    choose,
                    columns,
                    self.record,
                    halving=halving,
                    together=not isinstance(opened.logits, ResumingModel),
                    accepted=eligible,
                    progress=sweeping.at,
                )

            def at_every_layer(values: Sequence[float]) -> list[Cell]:
                return measure(dict.fromkeys(self.layers, values))

            cells = at_every_layer(coefficients)
            if recipe.sweep.coefficients == "auto" and not halving:
                cells, coefficients = refined(cells, coefficients, at_every_layer, eligible)
            at_defaults = {
                layer: [value for place, value in self.defaults if place == layer] for layer, _ in self.defaults
            }
            default = best_of_defaults(measure(at_defaults, False), self.defaults, accepted) if self.defaults else None
            choice = choosing.compared(cells, eligible)
            shown = next(iter(choice.above_zero), None) or choosing.strongest(cells)
            control = random_grid(choose, unit, shown.layer, coefficients, recipe.seed)
        with job.clock.time("report"):
            job.say("measuring the chosen cell on the pairs that were kept back")
            within = partial(within_guard, guard, bench.base_perplexity())
            chosen = self._within_guard_as_built(choice, found, bench, within)
            rows = rows_for(
                chosen,
                found.for_report,
                self.defaults,
                random_vectors=recipe.sweep.random_vectors,
                seed=recipe.seed,
                best_default=None if default is None else default.place,
            )
            report = measure_rows(bench, rows, measured.prompting, within, seed=recipe.seed)
            beside_random = random_control(report)
            decision = decide(choice, chosen, report, default, kept_back=measured.kept_back, guard=guard)
            recommended = chosen if decision.recommended else None
            details = NOTHING_SEEN
            if recommended is not None:
                steered, texts = (
                    bench.with_others({recommended[0]: found.for_report(*recommended)}),
                    bench.shown_texts(),
                )
                details = look(opened, recipe, spec, steered, job.say, texts=texts, neutral=bench.neutral.texts)
            report = told_apart(report, decision)
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
            "grid": [
                cell_json(cell, accepted(cell), choice.lows.get((cell.layer, cell.coefficient))) for cell in cells
            ],
            "baseline": choose.baseline(),
            "random_grid": control,
            "pareto": [{"layer": c.layer, "coefficient": c.coefficient} for c in choosing.pareto(cells)],
            "compared": {"cells": len(choice.ranked), "items": choice.items},
            "chosen": _place(chosen),
            "recommended": _place(recommended),
            "reason": decision.reason,
            "best_default": decision.best_default,
            "report": report,
            "random_control": beside_random,
            "behaviours": behaviours(report, bench.effect.count, spec.name),
            **details,
            "geometry": geometry(
                {layer: sides for layer in self.layers if (sides := found.of_cells[layer].sides) is not None},
                {layer: found.of_cells[layer].values for layer in self.layers},
            ),
            "notes": [*(self.parts.notes if measured.on_pairs else self._of_files()), *measured.notes],
        }
        cleaned: dict[str, Any] = finite_or_null(data)
        return cleaned

    def _within_guard_as_built(
        self, choice: choosing.Choice, found: SweptDirections, bench: CellBench, within: Callable[[float, float], bool]
    ) -> choosing.Place | None:
        """The best cell whose vector, as a build makes it, is within the guard on the texts of a build."""
        for cell in choice.above_zero:
            built = bench.with_others({cell.layer: found.for_guard(cell.layer, cell.coefficient)})
            (damage,) = bench.neutral.damage(bench.source, [built])
            if within(upper_kl(damage), damage.perplexity):
                return cell.layer, cell.coefficient
        return None

    def _of_files(self) -> list[str]:
        """What was read of vector files."""
        return [note for entry in self.parts.prepared if entry.file is not None for note in entry.notes]


def _place(place: choosing.Place | None) -> dict[str, Any] | None:
    return None if place is None else {"layer": place[0], "coefficient": place[1]}
