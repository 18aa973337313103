"""The build without an output folder: a copy of a Hub model is made on the Hub itself. Read it top to bottom.

recipe -> the base's small files and the headers of its weights -> architecture -> a plan that leaves the weight files
as they are -> only the blocks that are read -> steering vectors -> the new files -> what can be verified without the
rest -> manifest and card -> one commit, in which the Hub copies the base's weight files
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from patcher.build.base_run import vectors_before_download
from patcher.build.fallback import until_proven
from patcher.build.finishing import finish, push
from patcher.build.inputs import environment
from patcher.build.job import Job
from patcher.build.manifest import Copied
from patcher.build.planning import planned_again
from patcher.build.remote_planning import Needed, RemoteBuildPlan, needed_files, plan_remote_build, plan_remotely
from patcher.build.remote_refusals import LOCAL
from patcher.build.result import STAGES, BuildResult
from patcher.checkpoint.copying import sha256_of
from patcher.checkpoint.folder import INDEX
from patcher.checkpoint.hub_folder import HubCheckpoint
from patcher.checkpoint.source import fetch_files
from patcher.checkpoint.steering_files import numbered
from patcher.disk.failures import disk_errors
from patcher.patched.failed_route import FailedRoute
from patcher.patched.history import CARRIED, carry_history, history_of
from patcher.patched.schema import Manifest, Patch
from patcher.publish.contents import OnHub
from patcher.routes.apply import write_plan
from patcher.routes.plan import Plan
from patcher.vectors.directions import directions_of_file, steering_vector
from patcher.vectors.steering_vector import SteeringVector, sum_by_layer
from patcher.verify.of_build import require_passed
from patcher.verify.partial import PartialCopy, verify_partially
from patcher.verify.terms import VerifyTerms

NOT_EVALUATED = "the effect was not measured: that takes the whole model, which was not downloaded"


def remote_build(job: Job) -> BuildResult:
    """Build the steered copy on the Hub; of the base's weights only what the vectors and the route need comes here.

    Args:
        job: a recipe with ``output: null`` and ``push``; its output is a folder for files on the way, which is not
            there yet, and of which nothing is needed afterwards.

    Raises:
        InputError: the recipe, the pairs or the model is not usable, or takes the whole model.
        CheckFailed: what can be checked of the copy is wrong; nothing was published.
        OutsideError: the Hub, the disk or the memory failed, or the Hub does not copy the base's files.
    """
    clock = job.clock
    with clock.time("plan"):
        found = plan_remote_build(job)
    job = found.settled(job)
    recipe = job.recipe
    needed, vectors = found.needed, _vectors(job, found)
    some = f"downloading {len(needed.files)} of {len(found.checkpoint.weight_files)} weight files"
    with clock.time("load"):
        base = found.checkpoint.with_files(needed.files, job.say, some)
        history = history_of(base.path)
        _fetch_history(base, len(history))
    with clock.time("plan"):
        plan = planned_again(job, found, base, plan_remotely)
    layers = sorted(plan.sites)

    def another_plan(out: Mapping[str, str]) -> Plan:
        with clock.time("plan"):
            return plan_remotely(recipe, found.architecture, layers, base, out)

    def proven_copy(plan: Plan, failed: Sequence[FailedRoute]) -> _Proven:
        return _proven_copy(job, found, plan, base, vectors, history, failed)

    proven = until_proven(job, plan, proven_copy, another_plan, otherwise=LOCAL)
    copied, base = proven.copied, proven.base
    on_hub = {name: base.listed[source] for name, source in copied.written.absent.items()}
    pushed = push(job, copied.stage, {name: OnHub(file.size, file.sha256 or "") for name, file in on_hub.items()})
    timings = clock.timings(STAGES), clock.parts()
    downloaded = base.bytes_of(proven.needed.files)
    return BuildResult(None, proven.manifest, *timings, proven.size, bytes_downloaded=downloaded, push=pushed)


@dataclass(frozen=True)
class _Proven:
    """A copy that was proven as far as it can be here; ``size``: the bytes that were written for it."""

    copied: Copied
    base: HubCheckpoint
    needed: Needed
    manifest: Manifest
    size: int


def _proven_copy(
    job: Job,
    found: RemoteBuildPlan,
    plan: Plan,
    base: HubCheckpoint,
    vectors: Sequence[SteeringVector],
    history: Sequence[Patch],
    failed: Sequence[FailedRoute],
) -> _Proven:
    """The new files in a folder of their own, by ``plan``; what only this route needs of the base is downloaded."""
    recipe, stage = job.recipe, job.output / f"copy-{len(failed)}"
    needed = found.needed
    if failed:
        more = needed_files(plan, found.prepared, base, found.names)
        needed = replace(more, blocks=more.blocks | needed.blocks, read=more.read | frozenset(needed.files))
        with job.clock.time("load"):
            base = base.with_files(needed.files, job.say, "downloading what the next route needs")
    with disk_errors(stage, "the new files (a temporary folder, see TMPDIR)"):
        stage.mkdir()
        with job.stage("write", "writing what is new"):
            absent = [file for file in base.weight_files if file not in needed.changed]
            written = write_plan(plan, vectors, base, stage, absent=absent)
            carried = carry_history(base.path, stage, len(history))
        with job.stage("hash", "hashing the base's small files"):
            files = _records(base)
        copied = Copied(
            stage,
            base.source,
            base,
            plan,
            vectors,
            written,
            files,
            history,
            environment=environment(),
            notes=[*found.notes, *([NOT_EVALUATED] if recipe.evaluate.enabled else [])],
            prepared=found.prepared,
            failed=failed,
            remote=_remote_record(base, needed),
            loader=found.architecture.auto_class,
        )
        manifest, texts = finish(job, copied, lambda manifest: _checked(job, found, copied, base, manifest))
    return _Proven(copied, base, needed, manifest, written.bytes_written + carried + texts)


def _vectors(job: Job, found: RemoteBuildPlan) -> list[SteeringVector]:
    if found.needed.last is not None:
        return vectors_before_download(job, found)
    job.say("reading the vectors from their files; no activations are needed")
    vectors = [
        steering_vector(entry.spec, direction)
        for entry in found.prepared
        for direction in directions_of_file(entry, {})
    ]
    sum_by_layer(vectors)
    return vectors


def _fetch_history(base: HubCheckpoint, patches: int) -> None:
    """What earlier patches of a patched base kept, which goes along."""
    names = {
        name if number == patches else numbered(name, number) for number in range(1, patches + 1) for name in CARRIED
    }
    fetch_files(base.source, names & base.listed.keys())


def _records(base: HubCheckpoint) -> list[dict[str, Any]]:
    """The manifest's ``base.files``; of large files the Hub's own hash, small ones are here to be hashed."""
    small = [Path("config.json"), *([Path(INDEX)] if INDEX in base.listed else []), *base.side_files()]
    names = sorted({*map(str, small), *base.weight_files})
    return [
        {
            "name": name,
            "size": base.listed[name].size,
            "sha256": base.listed[name].sha256 or sha256_of(base.path / name),
        }
        for name in names
        if name in base.listed
    ]


def _remote_record(base: HubCheckpoint, needed: Needed) -> dict[str, Any]:
    """For ``steering.json``: which of the base's weights were here, and for what."""
    return {
        "downloaded": [{"name": name, "size": base.listed[name].size} for name in needed.files],
        "bytes_downloaded": base.bytes_of(needed.files),
        "bytes_of_weights": base.bytes_of(base.weight_files),
        "weight_files": len(base.weight_files),
        "blocks_read": None if needed.last is None else needed.last + 1,
        "changed": sorted(needed.changed),
    }


def _checked(job: Job, found: RemoteBuildPlan, copied: Copied, base: HubCheckpoint, manifest: Manifest) -> Manifest:
    """With what can be verified without the rest of the base."""
    recipe, scratch = job.recipe, copied.stage.with_name(f"verify-{copied.stage.name}")
    copy = PartialCopy(copied.stage, copied.written.absent, base, manifest, found.architecture, found.names)
    with job.clock.time("verify"):
        scratch.mkdir()
        entry = verify_partially(copy, VerifyTerms(recipe.verify, scratch=scratch, say=job.say, clock=job.clock))
        assert recipe.push is not None
        require_passed(entry, recipe.push.repo)
    return manifest.with_parts(verification=[entry])
