"""The part of a build that runs the base: activations, steering vectors, a fitted constant, the evaluation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patcher.architectures.quantised import quantisation_of
from patcher.build_result import Clock, DryRun
from patcher.capture.model import load_tokenizer, pick_device, pick_dtype
from patcher.capture.opened import OpenedBase, choose_mode, open_base
from patcher.capture.processes import Processes
from patcher.capture.shared_reader import shared_reader
from patcher.checkpoint.prepare import PreparedBase
from patcher.evaluate.of_build import evaluate_build
from patcher.recipe import Recipe
from patcher.routes.plan import Plan
from patcher.routes.planner import ROUTES
from patcher.vectors import SteeringVector
from patcher.vectors.finding import PreparedVector, answer_questions, find_vectors, sum_by_layer
from patcher.verify.probes import PROBES

Say = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """What the base was run for.

    Attributes:
        vectors: the steering vectors.
        prepared: the recipe's vectors with the pairs that they were made of.
        plan: the route, its constant fitted where it has one.
        evaluation: what was measured, or None.
        notes: what the user should know.
    """

    vectors: list[SteeringVector]
    prepared: list[PreparedVector]
    plan: Plan
    evaluation: dict[str, Any] | None
    notes: list[str]


def find(
    recipe: Recipe,
    recipe_path: Path,
    planned: DryRun,
    plan: Plan,
    base: PreparedBase,
    *,
    scratch: Path,
    clock: Clock,
    say: Say,
    note: Say,
    processes: Processes | None = None,
) -> Found:
    """Run the base once it is prepared.

    Args:
        scratch: a folder on a disk with room.
        note: called with what ``-v`` shows.
        processes: of a launch of several; all read activations, this one does the rest.

    Raises:
        InputError, OutsideError: see :func:`patcher.build.build`.
    """
    vectors: list[SteeringVector] = []
    if processes is not None:
        with clock.time("capture"):
            vectors = _find_together(recipe, recipe_path, planned, base, processes, say)
    device = pick_device(recipe.device)
    dtype = pick_dtype(recipe.dtype, base.parameter_count, base.stored_dtype, device)
    fit = ROUTES[plan.route].fit
    asks = "`method: persona`" if any(entry.asked for entry in planned.prepared) else None
    mode = choose_mode(
        recipe.capture.mode,
        size=base.parameter_count * dtype.itemsize,
        device=device,
        quantised=quantisation_of(base.checkpoint.config) is not None,
        whole=asks or (None if fit is None else "the fitted route"),
    )
    how = {"memory": "loading", "spread": "loading (spread over the disk)", "stream": "streaming"}[mode]
    say(f"{how} the model ({str(dtype).removeprefix('torch.')}, {device})")
    with ExitStack() as stack:
        with clock.time("load"):
            opened = stack.enter_context(
                open_base(
                    base.reference_folder,
                    base.checkpoint,
                    planned.architecture,
                    mode,
                    dtype=dtype,
                    device=device,
                    scratch=scratch,
                    batch_size=_rows(recipe),
                    note=note,
                )
            )
        return _run(recipe, recipe_path, planned, plan, opened, vectors, clock=clock, say=say)


def _run(
    recipe: Recipe,
    recipe_path: Path,
    planned: DryRun,
    plan: Plan,
    opened: OpenedBase,
    vectors: list[SteeringVector],
    *,
    clock: Clock,
    say: Say,
) -> Found:
    prepared, tokenizer, model = planned.prepared, opened.tokenizer, opened.model
    if not vectors:
        with clock.time("capture"):
            if any(entry.asked for entry in prepared):
                assert model is not None
                prepared = answer_questions(
                    prepared, model, tokenizer, recipe=recipe, recipe_name=recipe_path.name, progress=say
                )
            vectors = find_vectors(
                prepared, opened.reader, recipe_folder=recipe_path.parent, neutral=_neutral(tokenizer), progress=say
            )
    total = sum_by_layer(vectors)
    fit = ROUTES[plan.route].fit
    if fit is not None:
        from patcher.routes.fitting.calibration import load_calibration

        assert model is not None
        say("fitting the constant on calibration text")
        with clock.time("capture"):
            texts = load_calibration(recipe.calibration.texts, recipe_path.parent)
            options = {"architecture": planned.architecture, "vectors": total, "tokens": recipe.calibration.tokens}
            plan = fit(plan, model, tokenizer, texts, seed=recipe.seed, progress=say, **options)
    evaluation, notes = evaluate_build(
        recipe,
        prepared,
        opened.logits,
        tokenizer,
        total,
        positions=opened.positions,
        recipe_folder=recipe_path.parent,
        progress=say,
    )
    return Found(vectors, list(prepared), plan, evaluation, notes)


def _find_together(
    recipe: Recipe, recipe_path: Path, planned: DryRun, base: PreparedBase, processes: Processes, say: Say
) -> list[SteeringVector]:
    """The vectors, with activations that all processes of a launch read; after it this process is alone."""
    tokenizer = load_tokenizer(base.reference_folder, trust_remote_code=recipe.trust_remote_code)
    with shared_reader(
        processes,
        planned.architecture,
        folder=base.reference_folder,
        source=planned.source,
        last=max(layer for entry in planned.prepared for layer in entry.read_layers.values()),
        parallel=recipe.capture.parallel,
        device=recipe.device,
        dtype=recipe.dtype,
        parameters=base.parameter_count,
        stored=base.stored_dtype,
        batch_size=_rows(recipe),
        say=say,
    ) as reader:
        return find_vectors(
            planned.prepared, reader, recipe_folder=recipe_path.parent, neutral=_neutral(tokenizer), progress=say
        )


def _rows(recipe: Recipe) -> int | None:
    return None if recipe.capture.batch_size == "auto" else recipe.capture.batch_size


def _neutral(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in PROBES] if tokenizer is not None else []
