"""The build, from a recipe to a verified folder. Read it top to bottom: it is what the product does.

recipe -> base -> architecture -> plan -> contrast pairs -> residuals -> steering vectors -> evaluation
-> checkpoint folder -> verification -> manifest and card -> the output, in one rename -> the Hub
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from patcher.architectures.analysis import Architecture
from patcher.build.base_run import BaseRun, vectors_before_download
from patcher.build.manifest import build_manifest
from patcher.build.result import BuildResult, Clock, DryRun, peak_rss_bytes
from patcher.build.texts import write_texts
from patcher.capture.cache.key import model_identity
from patcher.capture.cache.store import capture_cache
from patcher.capture.model import load_tokenizer, pick_device
from patcher.capture.processes.launch import Processes
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.hashes import files_now, hashing
from patcher.checkpoint.prepare import (
    adapter_record,
    check_adapter,
    find_model,
    prepared_base,
    read_config,
)
from patcher.checkpoint.source import fetch
from patcher.checkpoint.staging import check_output, scratch_folder, staged_folder
from patcher.checkpoint.steering_files import ORIGINAL_PREFIX, RIGHT_PREFIX, SPREAD_PREFIX, VECTORS, tensor_key
from patcher.checkpoint.writer import write_copy
from patcher.errors import InputError
from patcher.evaluate.of_build import check_evaluation_inputs, require_effect, task_folder
from patcher.patched.history import carry_history, history_of
from patcher.recipe.schema import Recipe
from patcher.routes.apply import tensors_to_write
from patcher.routes.plan import Plan
from patcher.routes.planner import choose_route
from patcher.vectors import SteeringVector, save_vectors
from patcher.vectors.finding import prepare_vectors, sum_by_layer
from patcher.verify.of_build import require_passed, require_stacks, verify_build

Say = Callable[[str], None]


def dry_run(
    recipe: Recipe, recipe_path: Path, output: Path, *, force: bool = False, say: Say = print, writes: bool = True
) -> DryRun:
    """Everything that can be decided and checked without the weights; of a Hub model only small files are fetched.

    Args:
        writes: whether a folder is to be written, and must not be in the way.

    Raises:
        InputError: anything that would stop the build before its real work.
    """
    say("reading the model's config")
    require_stacks(recipe)
    source = find_model(recipe.model, recipe_path.parent, weights=False)
    if writes:
        check_output(output, force=force, inputs=(source.folder,))
    config = read_config(source.folder, trust_remote_code=recipe.trust_remote_code)
    architecture = Architecture(config, trust_remote_code=recipe.trust_remote_code)
    tokenizer = load_tokenizer(source.folder, trust_remote_code=recipe.trust_remote_code)
    say("checking the contrast pairs and the route")
    layers = _all_layers(recipe, recipe_path, architecture.block_count)
    checkpoint = None if source.hub else CheckpointFolder(source.folder)
    plan = _plan(recipe, architecture, layers, checkpoint, recipe.route)
    prepared = prepare_vectors(recipe, recipe_path.parent, recipe_path.name, tokenizer, architecture.block_count)
    check_adapter(recipe, recipe_path.parent)
    check_evaluation_inputs(recipe, recipe_path.parent)
    notes = [note for entry in prepared for note in entry.notes]
    notes += [
        f"vector `{spec.name}`: its `auto` is chosen by a sweep; until then 40 % depth and coefficient 1 stand for it"
        for spec in recipe.vectors
        if spec.swept
    ]
    return DryRun(source, architecture, plan, prepared, output, notes)


def build(
    recipe: Recipe,
    recipe_text: str,
    recipe_path: Path,
    output: Path,
    *,
    force: bool = False,
    say: Say = print,
    note: Say | None = None,
    cache: bool = True,
    link: bool = False,
    hash: bool = True,
    strict: bool = False,
    sweep: Mapping[str, Any] | None = None,
    token: str | None = None,
    processes: Processes | None = None,
) -> BuildResult:
    """Build, verify and write the steered copy; publish it if the recipe says so.

    Args:
        recipe: what to build.
        recipe_text: the recipe file's text, kept verbatim in the manifest.
        recipe_path: where it is; inputs are relative to it.
        output: the folder to make.
        force: replace a folder that holds our ``steering.json``.
        say: called with a line about what is going on.
        note: called with what only the curious want to know (``-v``).
        cache: whether activations that were captured before, of the same model and prompts, are taken again.
        link: place the weight files of which no byte changes as hard links to the base's, where that can be done.
        hash: whether the manifest gets the hashes of the base's files.
        strict: refuse a vector whose effect cannot be told from that of random ones, or that breaks the guard.
        sweep: how the layer and the coefficient were chosen, for the manifest and the card.
        processes: of a launch of several (this is process 0): all read activations, and this one does the rest.

    Raises:
        InputError: the recipe, the pairs, the model or the output is not usable (before any work where possible).
        CheckFailed: the finished folder is not steered as the hook steers, or ``strict`` does not hold. Nothing is
            left of it.
        OutsideError: the disk, the memory or the Hub failed; nothing is left.
    """
    clock = Clock()
    planned = dry_run(recipe, recipe_path, output, force=force, say=say)
    source = planned.source
    if processes is not None and any(entry.asked for entry in planned.prepared):
        raise InputError(
            "`method: persona` lets the whole model write, in one process",
            where=f"{processes.world.size} processes",
            remedy="start it without torchrun: device: auto spreads the model over all devices",
            code="parallel",
        )
    quiet: Say = note or (lambda _text: None)
    kept = capture_cache(enabled=cache)
    early: list[SteeringVector] = []
    if source.hub:
        if recipe.capture.mode == "stream" and recipe.adapter is None and processes is None:
            early = vectors_before_download(recipe, recipe_path, planned, output, clock, say, quiet, kept)
        say(f"downloading {source.name}")
        with clock.time("load"):
            source = fetch(source.name, source.revision, weights=True)
    history = history_of(source.folder)
    whole_base = CheckpointFolder(source.folder)
    opened = files_now(whole_base)
    with prepared_base(source, recipe, recipe_path.parent, output, say) as base:
        # Again, now that the names on disk are known (a download, a merged adapter), for the route that was chosen.
        plan = _plan(recipe, planned.architecture, list(planned.plan.sites), base.checkpoint, planned.plan.route)
        plan = replace(plan, advice=planned.plan.advice)
        with scratch_folder(output) as scratch:
            identity = model_identity(source, base.adapter, trust_remote_code=recipe.trust_remote_code)
            run = BaseRun(recipe, recipe_path, planned, base, scratch, clock, say, quiet, kept, identity)
            found = run.find(plan, processes, early)
        if strict:
            require_effect(found.evaluation, recipe_path.name)
        plan, total = found.plan, sum_by_layer(found.vectors)
        created, replaced = tensors_to_write(plan, total, base.checkpoint)
        with staged_folder(output, force=force) as stage, hashing(whole_base, hash=hash, since=opened) as hashes:
            say("writing the copy")
            with clock.time("write"):
                written = write_copy(
                    base.checkpoint,
                    stage,
                    created=created,
                    replaced=replaced,
                    config_changes=plan.config_changes,
                    dropped=plan.dropped,
                    renamed=plan.renamed,
                    config=plan.config,
                    tokenizer_changes=plan.tokenizer_changes,
                    remote_code=recipe.trust_remote_code,
                    # What was converted or merged goes away after this, and need not be copied.
                    link=link or base.checkpoint.path != source.folder,
                )
                held = {tensor_key(vector.name, vector.layer): vector.values for vector in found.vectors}
                originals = {ORIGINAL_PREFIX + name: tensor for name, tensor in written.originals.items()}
                save_vectors(
                    stage / VECTORS, {**held, **originals, **_sides(plan)}, {"format": "pt", "tool": "patch-model"}
                )
                carried = carry_history(source.folder, stage, len(history))
            say("hashing the base")
            with clock.time("hash"):
                files = hashes.records()
            records = [record for entry in found.prepared for record in entry.records]
            manifest = build_manifest(
                stage,
                source=source,
                adapter=adapter_record(recipe, recipe_path.parent, base),
                files=files,
                recipe=recipe,
                recipe_text=recipe_text,
                plan=plan,
                vectors=found.vectors,
                originals=written.originals,
                config_before=base.checkpoint.config,
                evaluation=found.evaluation if sweep is None else {**(found.evaluation or {}), "sweep": dict(sweep)},
                notes=[*(line for entry in found.prepared for line in entry.notes), *found.notes],
                undo=written.undo,
                history=history,
                recipe_folder=recipe_path.parent,
                written_for={str(record["vector"]) for record in records},
            )
            with clock.time("verify"), scratch_folder(output) as scratch:
                entries = verify_build(
                    recipe,
                    stage,
                    base.reference_folder,
                    manifest,
                    scratch=scratch,
                    progress=say,
                    check=lambda entry: require_passed(entry, str(output), exact=plan.exact),
                )
            manifest = manifest.with_parts(verification=entries)
            if recipe.evaluate.enabled and recipe.evaluate.lm_eval:
                tasks = _tasks(recipe, recipe_path.parent, base.reference_folder, stage, say)
                measured = manifest.evaluation.as_json() if manifest.evaluation else {"per_vector": []}
                manifest = manifest.with_parts(evaluation={**measured, "lm_eval": tasks})
            size = written.bytes_written + carried + write_texts(stage, manifest, source, records)
    size += (output / VECTORS).stat().st_size
    result = BuildResult(output, manifest, clock.stop(), peak_rss_bytes(), size, written.placed)
    if recipe.push is not None:
        result.push = _push(recipe, output, say, token)
    return result


def _plan(
    recipe: Recipe, architecture: Architecture, layers: list[int], checkpoint: CheckpointFolder | None, route: str
) -> Plan:
    return choose_route(
        architecture,
        layers,
        checkpoint,
        targets=recipe.targets,
        route=route,
        exact=recipe.exact,
        prefer=recipe.prefer,
    )


def _tasks(recipe: Recipe, recipe_folder: Path, base: Path, stage: Path, say: Say) -> list[dict[str, Any]]:
    from patcher.evaluate.lm_eval_tasks import compare_tasks

    device = pick_device(recipe.device)
    return compare_tasks(
        base,
        stage,
        recipe.evaluate.lm_eval,
        where="evaluate.lm_eval",
        limit=recipe.evaluate.lm_eval_limit,
        task_folder=task_folder(recipe, recipe_folder),
        seed=recipe.seed,
        dtype=torch.float32 if device == "cpu" else torch.bfloat16,
        device=device,
        trust_remote_code=recipe.trust_remote_code,
        progress=say,
    )


def _sides(plan: Plan) -> dict[str, torch.Tensor]:
    """What is needed to read the vectors back from matrices that hold them."""
    rights = {RIGHT_PREFIX + write.name: write.right for write in plan.carriers if write.right is not None}
    spreads = {SPREAD_PREFIX + write.name: write.spread for write in plan.carriers if write.spread is not None}
    return {**rights, **spreads}


def _all_layers(recipe: Recipe, recipe_path: Path, block_count: int) -> list[int]:
    from patcher.vectors.layers import resolve_layers

    layers = set()
    for index, spec in enumerate(recipe.vectors):
        layers.update(resolve_layers(spec, block_count, f"{recipe_path.name}: vectors.{index}"))
    return sorted(layers)


def _push(recipe: Recipe, output: Path, say: Say, token: str | None) -> dict[str, Any]:
    from dataclasses import asdict

    from patcher.publish.hub import push_folder

    assert recipe.push is not None
    result = push_folder(
        output,
        recipe.push.repo,
        private=recipe.push.private,
        revision=recipe.push.revision,
        pull_request=recipe.push.pull_request,
        commit_message=recipe.push.commit_message,
        token=token,
        progress=say,
    )
    return asdict(result)
