"""The build without an output folder: a copy of a Hub model is made on the Hub itself. Read it top to bottom.

recipe -> the base's small files and the headers of its weights -> architecture -> a plan that leaves the weight files
as they are -> only the blocks that are read -> steering vectors -> the new files -> what can be verified without the
rest -> manifest and card -> one commit, in which the Hub copies the base's weight files
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from patcher.build.base_run import vectors_before_download
from patcher.build.job import Job
from patcher.build.manifest import build_manifest
from patcher.build.planning import planned_again
from patcher.build.remote_planning import Needed, RemoteBuildPlan, plan_remote_build, plan_remotely
from patcher.build.remote_result import RemoteResult
from patcher.build.result import STAGES, peak_rss_bytes
from patcher.build.texts import write_texts
from patcher.checkpoint.copying import sha256_of
from patcher.checkpoint.folder import INDEX
from patcher.checkpoint.hub_folder import HubCheckpoint, fetch_files
from patcher.checkpoint.steering_files import ORIGINAL_PREFIX, RIGHT_PREFIX, VECTORS, numbered, tensor_key
from patcher.checkpoint.writer import Written, write_copy
from patcher.disk.failures import disk_errors
from patcher.patched.history import CARRIED, carry_history, history_of
from patcher.publish.contents import OnHub
from patcher.publish.hub import push_folder
from patcher.routes.apply import tensors_to_write
from patcher.routes.plan import Plan
from patcher.vectors import SteeringVector, save_vectors
from patcher.vectors.finding import directions_of_file, steering_vector, sum_by_layer
from patcher.verify.of_build import require_passed
from patcher.verify.partial import PartialCopy, verify_partially
from patcher.verify.terms import VerifyTerms

NOT_EVALUATED = "the effect was not measured: that takes the whole model, which was not downloaded"


def remote_build(job: Job) -> RemoteResult:
    """Build the steered copy on the Hub; of the base's weights only what the vectors and the route need comes here.

    Args:
        job: a recipe with ``output: null`` and ``push``; its output is a folder for files on the way, which is not
            there yet, and of which nothing is needed afterwards.

    Raises:
        InputError: the recipe, the pairs or the model is not usable, or takes the whole model.
        CheckFailed: what can be checked of the copy is wrong; nothing was published.
        OutsideError: the Hub, the disk or the memory failed, or the Hub does not copy the base's files.
    """
    recipe, loaded, place, say, clock = job.recipe, job.loaded, job.output, job.say, job.clock
    found = plan_remote_build(job)
    planned, needed = found.planned, found.needed
    vectors = _vectors(job, found)
    total = sum_by_layer(vectors)
    say(f"downloading {len(needed.files)} of {len(found.checkpoint.weight_files)} weight files")
    with clock.time("load"):
        base = found.checkpoint.with_files(needed.files)
        history = history_of(base.path)
        _fetch_history(base, len(history))
    plan = planned_again(job, planned, base, plan_remotely)
    created, replaced = tensors_to_write(plan, total, base)
    stage = place / "copy"
    with disk_errors(stage, "the new files (a temporary folder, see TMPDIR)"):
        stage.mkdir()
        say("writing what is new")
        with clock.time("write"):
            written = write_copy(
                base,
                stage,
                created=created,
                replaced=replaced,
                config_changes=plan.config_changes,
                dropped=plan.dropped,
                renamed=plan.renamed,
                config=plan.config,
                tokenizer_changes=plan.tokenizer_changes,
                absent=[file for file in base.weight_files if file not in needed.changed],
            )
            size = written.bytes_written + _write_vectors(stage, plan, vectors, written)
            size += carry_history(base.path, stage, len(history))
        with clock.time("hash"):
            files = _records(base)
        manifest = build_manifest(
            stage,
            source=base.source,
            adapter=None,
            files=files,
            recipe=recipe,
            recipe_text=loaded.text,
            plan=plan,
            vectors=vectors,
            originals=written.originals,
            config_before=base.config,
            evaluation=None,
            notes=[*planned.notes, *([NOT_EVALUATED] if recipe.evaluate.enabled else [])],
            undo=written.undo,
            history=history,
            recipe_folder=loaded.folder,
            remote=_remote_record(base, needed),
        )
        copy = PartialCopy(stage, written.absent, base, manifest, planned.architecture, found.names)
        with clock.time("verify"):
            manifest = manifest.with_parts(verification=[_verified(job, copy, place / "verify")])
        size += write_texts(stage, manifest, base.source, [])
    push = _push(job, copy)
    return RemoteResult(manifest, clock.read(STAGES), peak_rss_bytes(), size, base.bytes_of(needed.files), push)


def _vectors(job: Job, found: RemoteBuildPlan) -> list[SteeringVector]:
    planned = found.planned
    if found.needed.last is not None:
        return vectors_before_download(job, planned)
    job.say("reading the vectors from their files; no activations are needed")
    return [
        steering_vector(entry.spec, direction)
        for entry in planned.prepared
        for direction in directions_of_file(entry, planned.architecture.hidden, {})
    ]


def _fetch_history(base: HubCheckpoint, patches: int) -> None:
    """What earlier patches of a patched base kept, which goes along."""
    names = {
        name if number == patches else numbered(name, number) for number in range(1, patches + 1) for name in CARRIED
    }
    fetch_files(base.source, names & base.listed.keys())


def _write_vectors(stage: Path, plan: Plan, vectors: list[SteeringVector], written: Written) -> int:
    held = {tensor_key(vector.name, vector.layer): vector.values for vector in vectors}
    originals = {ORIGINAL_PREFIX + name: tensor for name, tensor in written.originals.items()}
    rights = {RIGHT_PREFIX + write.name: write.right for write in plan.carriers if write.right is not None}
    save_vectors(stage / VECTORS, {**held, **originals, **rights}, {"format": "pt", "tool": "patch-model"})
    return (stage / VECTORS).stat().st_size


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


def _verified(job: Job, copy: PartialCopy, scratch: Path) -> Mapping[str, Any]:
    recipe = job.recipe
    scratch.mkdir()
    entry = verify_partially(copy, VerifyTerms(recipe.verify, scratch=scratch, say=job.say))
    assert recipe.push is not None
    require_passed(entry, recipe.push.repo)
    return entry


def _push(job: Job, copy: PartialCopy) -> dict[str, Any]:
    push = job.recipe.push
    assert push is not None
    on_hub = {}
    for name, source in copy.absent.items():
        file = copy.base.listed[source]
        on_hub[name] = OnHub(file.size, file.sha256 or "")
    result = push_folder(
        copy.folder,
        push.repo,
        private=push.private,
        revision=push.revision,
        pull_request=push.pull_request,
        commit_message=push.commit_message,
        token=job.token,
        progress=job.say,
        on_hub=on_hub,
    )
    return asdict(result)
