"""The build, from a recipe to a verified folder. Read it top to bottom: it is what the product does.

recipe -> base -> architecture -> plan -> contrast pairs -> residuals -> steering vectors -> evaluation
-> checkpoint folder -> verification -> manifest and card -> the output, in one rename -> the Hub
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from patcher.build.base_run import BaseRun, Found, vectors_before_download
from patcher.build.fallback import until_proven
from patcher.build.finishing import finish, push
from patcher.build.inputs import environment
from patcher.build.job import Job
from patcher.build.manifest import Copied
from patcher.build.planning import BuildPlan, next_to, plan_build, planned_again, route_for, with_weights
from patcher.build.result import STAGES, BuildResult
from patcher.capture.model import pick_device
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.hashes import Hashing, files_now, hashing
from patcher.checkpoint.prepare import PreparedBase, prepared_base
from patcher.checkpoint.side_files import adapter_record
from patcher.checkpoint.staging import scratch_folder, staged_folder
from patcher.checkpoint.writer import Written
from patcher.errors import InputError
from patcher.evaluate.inputs import lm_eval_tasks
from patcher.evaluate.of_build import require_effect
from patcher.patched.failed_route import FailedRoute
from patcher.patched.history import carry_history, history_of
from patcher.patched.schema import Manifest, Patch
from patcher.progress.stage import BYTES, bytes_in
from patcher.routes.apply import write_plan
from patcher.routes.plan import Plan
from patcher.vectors.steering_vector import SteeringVector
from patcher.verify.of_build import require_passed, verify_build
from patcher.verify.warm import prepare, warmed_up
from patcher.verify.watched import WaitingProcess

_NO_EFFECT: Mapping[str, Any] = {"per_vector": []}
"""The evaluation of a build that measured no vector, but has something else to say there."""


def build(
    job: Job, *, link: bool = False, hash: bool = True, strict: bool = False, sweep: Mapping[str, Any] | None = None
) -> BuildResult:
    """Build, verify and write the steered copy; publish it if the recipe says so.

    Args:
        job: the recipe, and the folder to make.
        link: place the weight files of which no byte changes as hard links to the base's, where that can be done.
        hash: whether the manifest gets the hashes of the base's files.
        strict: refuse a vector whose effect cannot be told from that of random ones, or that breaks the guard.
        sweep: how the layer and the coefficient were chosen, for the manifest and the card.

    Raises:
        InputError: the recipe, the pairs, the model or the output is not usable (before any work where possible).
        CheckFailed: the finished folder is not steered as the hook steers, or ``strict`` does not hold. Nothing is
            left of it.
        OutsideError: the disk, the memory or the Hub failed; nothing is left.
    """
    with warmed_up() as warm:
        return _build(job, warm, link=link, hash=hash, strict=strict, sweep=sweep)


def _build(
    job: Job, warm: WaitingProcess | None, *, link: bool, hash: bool, strict: bool, sweep: Mapping[str, Any] | None
) -> BuildResult:
    clock = job.clock
    with clock.time("plan"):
        planned = plan_build(job)
    job = planned.settled(job)
    recipe, loaded, output, say = job.recipe, job.loaded, job.output, job.say
    _require_alone(job, planned)
    early: list[SteeringVector] = []
    if planned.source.hub and recipe.capture.mode == "stream" and recipe.adapter is None and job.processes is None:
        early = vectors_before_download(job, planned)
    planned = with_weights(job, planned)
    prepare(warm, planned.source.folder, device=job.recipe.device)
    source = planned.source
    history = history_of(source.folder)
    whole_base = CheckpointFolder(source.folder)
    opened = files_now(whole_base)
    prepared = prepared_base(source, loaded, output, say, planned.adapter, planned.reading.stripped)
    with clock.opening("load", prepared) as base:
        with clock.time("plan"):
            plan = planned_again(job, planned, base.checkpoint, route_for)
            run = BaseRun.of(job, planned, base)
            plan = run.weighing.before_load(plan)
        found = run.find(plan, early)
        if strict:
            require_effect(found.evaluation, loaded.path.name)
        plan = found.plan
        if plan.route != planned.plan.route:
            # What came first was not taken: its constant would be too short.
            out = {planned.plan.route: "its constant would be too short"}
            plan = next_to(recipe, planned.architecture, sorted(plan.sites), base.checkpoint, plan, out)
        else:
            plan = replace(plan, next_best=planned.plan.next_best)
        # What was converted or merged goes away after this, and need not be copied.
        link = link or base.checkpoint.path != source.folder
        with hashing(whole_base, hash=hash, since=opened) as hashes:
            copying = _Copying(job, planned, run, found, hashes, history, warm, link=link, sweep=sweep)
            written, manifest = until_proven(job, plan, copying.proven_copy, copying.another_plan)
    pushed = None if recipe.push is None else push(job, output)
    timings = clock.timings(STAGES), clock.parts()
    return BuildResult(output, manifest, *timings, written.bytes_written, placed=written.placed, push=pushed)


@dataclass(frozen=True)
class _Copying:
    """Writes and proves copies of one base with one set of vectors, by whichever route."""

    job: Job
    planned: BuildPlan
    run: BaseRun
    found: Found
    hashes: Hashing
    history: Sequence[Patch]
    warm: WaitingProcess | None
    link: bool = field(kw_only=True)
    sweep: Mapping[str, Any] | None = field(kw_only=True)

    def another_plan(self, out: Mapping[str, str]) -> Plan:
        """The next best plan; ``out``: which routes are out of the question, and why."""
        recipe, layers = self.job.recipe, sorted(self.planned.plan.sites)
        with self.job.clock.time("plan"):
            wanted = recipe, self.planned.architecture, layers, self.run.base.checkpoint
            without = dict(out)
            while (plan := route_for(*wanted, without)).route not in without:
                with suppress(InputError):
                    weighed = self.run.weighing.before_load(plan)
                    if weighed.route not in without:
                        return next_to(*wanted, weighed, without)
                without[plan.route] = "its constant would be too short"
            return plan

    def proven_copy(self, plan: Plan, failed: Sequence[FailedRoute]) -> tuple[Written, Manifest]:
        """The output, written by ``plan``; of one whose proof fails nothing is left. What was written, all told."""
        job, planned, base, found = self.job, self.planned, self.run.base, self.found
        folder, hashes = planned.source.folder, self.hashes
        with staged_folder(job.output, force=job.force) as stage:
            stored = sum(tensor.size for tensor in base.checkpoint.tensors.values())
            with job.stage("write", "writing the copy", stored, BYTES, lambda: bytes_in(stage)):
                trusted = job.recipe.trust_remote_code
                written = write_plan(plan, found.vectors, base.checkpoint, stage, link=self.link, remote_code=trusted)
                carried = carry_history(folder, stage, len(self.history))
            with job.stage("hash", "hashing the base", hashes.size, BYTES, lambda: hashes.done):
                files = hashes.records()
            copied = Copied(
                stage,
                planned.source,
                base.checkpoint,
                plan,
                found.vectors,
                written,
                files,
                self.history,
                environment=environment(*self.run.computed_in),
                notes=[
                    *planned.reading.notes,
                    *base.notes,
                    *planned.about_tokenizer,
                    *(line for entry in found.prepared for line in entry.notes),
                    *found.notes,
                ],
                adapter=adapter_record(base.adapter),
                stripped=planned.reading.stripped,
                evaluation=self._evaluation,
                prepared=found.prepared,
                responses=[record for entry in found.prepared for record in entry.records],
                failed=failed,
                loader=planned.architecture.auto_class,
            )
            # The process that was started early ends with its first job.
            warm = None if failed else self.warm
            manifest, texts = finish(job, copied, lambda manifest: _proven(job, base, stage, manifest, warm))
        return replace(written, bytes_written=written.bytes_written + carried + texts), manifest

    @property
    def _evaluation(self) -> Mapping[str, Any] | None:
        measured = self.found.evaluation
        return measured if self.sweep is None else {**(measured or _NO_EFFECT), "sweep": self.sweep}


def _require_alone(job: Job, planned: BuildPlan) -> None:
    if job.processes is not None and (planned.asks or planned.with_images):
        what = "`method: persona` lets the whole model write" if planned.asks else "pairs with images are read"
        raise InputError(
            f"{what}, in one process",
            where=f"{job.processes.world.size} processes",
            remedy="start it without torchrun: device: auto spreads the model over all devices",
            code="parallel",
        )


def _proven(job: Job, base: PreparedBase, stage: Path, manifest: Manifest, warm: WaitingProcess | None) -> Manifest:
    """With the verification in every stack that the recipe asks for, and its lm-eval tasks."""
    recipe = job.recipe
    with job.clock.time("verify"), scratch_folder(job.output) as scratch:
        entries = verify_build(
            recipe,
            stage,
            base.reference_folder,
            manifest,
            scratch=scratch,
            progress=job.say,
            clock=job.clock,
            check=lambda entry: require_passed(entry, str(job.output), exact=manifest.route.exact),
            warm=warm,
        )
    manifest = manifest.with_parts(verification=entries)
    if not (recipe.evaluate.enabled and recipe.evaluate.lm_eval):
        return manifest
    from patcher.evaluate.lm_eval_tasks import compare_tasks

    device = pick_device(recipe.device)
    tasks = compare_tasks(
        base.reference_folder,
        stage,
        lm_eval_tasks(job.loaded),
        job.say,
        dtype=torch.float32 if device == "cpu" else torch.bfloat16,
        device=device,
        trust_remote_code=recipe.trust_remote_code,
    )
    measured = manifest.evaluation.as_json() if manifest.evaluation else _NO_EFFECT
    return manifest.with_parts(evaluation={**measured, "lm_eval": tasks})
