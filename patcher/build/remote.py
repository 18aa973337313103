"""The build without an output folder: a copy of a Hub model is made on the Hub itself. Read it top to bottom.

recipe -> the base's small files and the headers of its weights -> architecture -> a plan that leaves the weight files
as they are -> only the blocks that are read -> steering vectors -> the new files -> what can be verified without the
rest -> manifest and card -> one commit, in which the Hub copies the base's weight files
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from patcher.architectures.analysis import Architecture
from patcher.build.base_run import vectors_before_download
from patcher.build.manifest import build_manifest
from patcher.build.remote_planning import Needed, needed_files, plan_remotely
from patcher.build.remote_refusals import check_base, check_recipe
from patcher.build.remote_result import RemoteDryRun, RemoteResult
from patcher.build.remote_vectors import vectors_from_files
from patcher.build.result import Clock, DryRun, peak_rss_bytes
from patcher.build.texts import write_texts
from patcher.capture.cache.store import capture_cache
from patcher.capture.model import load_tokenizer
from patcher.capture.processes.launch import Processes
from patcher.checkpoint.block_names import block_names
from patcher.checkpoint.copying import sha256_of
from patcher.checkpoint.folder import INDEX
from patcher.checkpoint.hub_folder import HubCheckpoint, fetch_files, files_on_the_hub
from patcher.checkpoint.prepare import read_config
from patcher.checkpoint.source import fetch
from patcher.checkpoint.steering_files import ORIGINAL_PREFIX, RIGHT_PREFIX, VECTORS, numbered, tensor_key
from patcher.checkpoint.writer import Written, write_copy
from patcher.disk.failures import disk_errors
from patcher.patched.history import CARRIED, carry_history, history_of
from patcher.publish.contents import OnHub
from patcher.publish.hub import check_can_publish, push_folder
from patcher.recipe.schema import Recipe
from patcher.routes.apply import tensors_to_write
from patcher.routes.plan import Plan
from patcher.vectors import SteeringVector, save_vectors
from patcher.vectors.finding import prepare_vectors, sum_by_layer
from patcher.vectors.layers import resolve_layers
from patcher.verify.of_build import require_passed
from patcher.verify.partial import PartialCopy, verify_partially

Say = Callable[[str], None]
NOT_EVALUATED = "the effect was not measured: that takes the whole model, which was not downloaded"


def remote_dry_run(
    recipe: Recipe, recipe_path: Path, place: Path, *, say: Say = print, token: str | None = None
) -> RemoteDryRun:
    """Everything that can be decided from the base's small files and the headers of its weights.

    Args:
        place: an empty folder for files on the way; the result refers to it.
        token: of the account that publishes.

    Raises:
        InputError: anything that would stop the build before its real work.
        OutsideError: the Hub cannot be asked, or forbids it.
    """
    name, revision = check_recipe(recipe, recipe_path.parent)
    assert recipe.push is not None
    say("asking the Hub")
    check_can_publish(recipe.push.repo, recipe.push.revision, recipe.push.pull_request, token)
    source = fetch(name, revision, weights=False)
    check_base(source, trust_remote_code=recipe.trust_remote_code)
    config = read_config(source.folder)
    architecture = Architecture(config)
    tokenizer = load_tokenizer(source.folder)
    say("checking the contrast pairs")
    layers: set[int] = set()
    for index, spec in enumerate(recipe.vectors):
        layers.update(resolve_layers(spec, architecture.block_count, f"{recipe_path.name}: vectors.{index}"))
    prepared = prepare_vectors(recipe, recipe_path.parent, recipe_path.name, tokenizer, architecture.block_count)
    say("reading the headers of the weight files, and choosing the route")
    with disk_errors(place, "the headers of the weight files (a temporary folder, see TMPDIR)"):
        (place / "hollow").mkdir(parents=True)
        checkpoint = HubCheckpoint(source, files_on_the_hub(source), place / "hollow")
    plan = plan_remotely(recipe, architecture, sorted(layers), checkpoint, recipe.route)
    names = block_names(architecture)
    notes = [note for entry in prepared for note in entry.notes]
    planned = DryRun(source, architecture, plan, prepared, Path(recipe.push.repo), notes)
    return RemoteDryRun(planned, checkpoint, names, needed_files(plan, prepared, checkpoint, names))


def remote_build(
    recipe: Recipe,
    recipe_text: str,
    recipe_path: Path,
    *,
    say: Say = print,
    note: Say | None = None,
    cache: bool = True,
    token: str | None = None,
    processes: Processes | None = None,
) -> RemoteResult:
    """Build the steered copy on the Hub; of the base's weights only what the vectors and the route need comes here.

    Args:
        recipe: what to build, with ``output: null`` and ``push``.
        recipe_text: the recipe file's text, kept verbatim in the manifest.
        recipe_path: where it is; inputs are relative to it.
        say: called with a line about what is going on.
        note: called with what only the curious want to know.
        cache: whether activations that were captured before are taken again.
        token: of the account that publishes.
        processes: of a launch of several, which is refused.

    Raises:
        InputError: the recipe, the pairs or the model is not usable, or takes the whole model.
        CheckFailed: what can be checked of the copy is wrong; nothing was published.
        OutsideError: the Hub, the disk or the memory failed, or the Hub does not copy the base's files.
    """
    clock = Clock()
    check_recipe(recipe, recipe_path.parent, processes)
    with tempfile.TemporaryDirectory(prefix="patch-model-remote-") as name:
        place = Path(name).resolve()
        found = remote_dry_run(recipe, recipe_path, place, say=say, token=token)
        planned, needed = found.planned, found.needed
        vectors = _vectors(recipe, recipe_path, found, place, clock, say, note, cache=cache)
        total = sum_by_layer(vectors)
        say(f"downloading {len(needed.files)} of {len(found.checkpoint.weight_files)} weight files")
        with clock.time("load"):
            base = found.checkpoint.with_files(needed.files)
            history = history_of(base.path)
            _fetch_history(base, len(history))
        # Again, now that the tensors that are added to can be read.
        layers = sorted(planned.plan.sites)
        plan = plan_remotely(recipe, planned.architecture, layers, base, planned.plan.route)
        plan = replace(plan, advice=planned.plan.advice)
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
                recipe_text=recipe_text,
                plan=plan,
                vectors=vectors,
                originals=written.originals,
                config_before=base.config,
                evaluation=None,
                notes=[*planned.notes, *([NOT_EVALUATED] if recipe.evaluate.enabled else [])],
                undo=written.undo,
                history=history,
                recipe_folder=recipe_path.parent,
                remote=_remote_record(base, needed),
            )
            copy = PartialCopy(stage, written.absent, base, manifest, planned.architecture, found.names)
            with clock.time("verify"):
                manifest = manifest.with_parts(verification=[_verified(recipe, copy, place / "verify", say)])
            size += write_texts(stage, manifest, base.source, [])
        push = _push(recipe, copy, say, token)
    return RemoteResult(manifest, clock.stop(), peak_rss_bytes(), size, base.bytes_of(needed.files), push)


def _vectors(
    recipe: Recipe,
    recipe_path: Path,
    found: RemoteDryRun,
    place: Path,
    clock: Clock,
    say: Say,
    note: Say | None,
    *,
    cache: bool,
) -> list[SteeringVector]:
    planned = found.planned
    if found.needed.last is None:
        say("reading the vectors from their files; no activations are needed")
        return vectors_from_files(planned.prepared, planned.architecture.hidden, recipe_path.parent)
    quiet: Say = note or (lambda _text: None)
    kept = capture_cache(enabled=cache)
    return vectors_before_download(recipe, recipe_path, planned, place / "capture", clock, say, quiet, kept)


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


def _verified(recipe: Recipe, copy: PartialCopy, scratch: Path, say: Say) -> Mapping[str, Any]:
    scratch.mkdir()
    entry = verify_partially(
        copy,
        scratch,
        progress=say,
        tolerance=recipe.verify.tolerance,
        probes=recipe.verify.probes,
        long_prompt_limit=recipe.verify.long_prompt_limit,
    )
    assert recipe.push is not None
    require_passed(entry, recipe.push.repo)
    return entry


def _push(recipe: Recipe, copy: PartialCopy, say: Say, token: str | None) -> dict[str, Any]:
    assert recipe.push is not None
    on_hub = {}
    for name, source in copy.absent.items():
        file = copy.base.listed[source]
        on_hub[name] = OnHub(file.size, file.sha256 or "")
    result = push_folder(
        copy.folder,
        recipe.push.repo,
        private=recipe.push.private,
        revision=recipe.push.revision,
        pull_request=recipe.push.pull_request,
        commit_message=recipe.push.commit_message,
        token=token,
        progress=say,
        on_hub=on_hub,
    )
    return asdict(result)
