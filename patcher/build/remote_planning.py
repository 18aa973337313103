"""The plan of a remote build: a route that leaves most weight files as they are, and which of them are needed here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from patcher.architectures.analysis import Architecture
from patcher.build.fed_texts import check_fed_texts
from patcher.build.job import Job
from patcher.build.planning import BuildPlan, all_layers, route_for, steered_model
from patcher.build.remote_refusals import LOCAL, check_base, check_recipe, refuse_images, require_plain_names
from patcher.capture.model import load_tokenizer
from patcher.checkpoint.block_names import BlockNames, block_names, tensors_for_blocks
from patcher.checkpoint.completeness import require_complete
from patcher.checkpoint.hub_folder import HubCheckpoint, files_on_the_hub
from patcher.checkpoint.prepare import read_config
from patcher.checkpoint.source import fetch
from patcher.disk.failures import disk_errors
from patcher.errors import InputError
from patcher.pairs.image_prompts import ImagePrompts
from patcher.publish.hub import check_can_publish
from patcher.recipe.schema import Recipe
from patcher.routes.plan import Plan
from patcher.routes.planner import ROUTES, rank, survey
from patcher.stacks.names import demanded_stacks
from patcher.vectors.finding import prepare_vectors
from patcher.vectors.prepared import PreparedVector


@dataclass(frozen=True)
class Needed:
    """Which weight files are downloaded, by what for; the rest stay on the Hub.

    Attributes:
        blocks: for activations, and for the check that runs the first blocks.
        last: the last of these blocks, 0-based; None if no activations are read.
        changed: files that a tensor is added to, which are uploaded again.
        read: files of tensors that new ones are made of.
    """

    blocks: frozenset[str]
    last: int | None
    changed: frozenset[str]
    read: frozenset[str]

    @property
    def files(self) -> list[str]:
        return sorted(self.blocks | self.changed | self.read)


@dataclass(frozen=True)
class RemoteBuildPlan(BuildPlan):
    """What a remote build does; its ``output`` is the repository.

    Attributes:
        checkpoint: the base, by its headers.
        names: how its tensors are told apart.
        needed: the weight files that are downloaded.
    """

    checkpoint: HubCheckpoint
    names: BlockNames
    needed: Needed

    @property
    def download(self) -> dict[str, Any]:
        """{files, bytes, of_files, of_bytes}: of the weight files."""
        every = self.checkpoint.weight_files
        return {
            "files": self.needed.files,
            "bytes": self.checkpoint.bytes_of(self.needed.files),
            "of_files": len(every),
            "of_bytes": self.checkpoint.bytes_of(every),
        }

    def as_json(self) -> dict[str, Any]:
        return {**super().as_json(), "output": None, "repo": str(self.output), "download": self.download}


def plan_remote_build(job: Job) -> RemoteBuildPlan:
    """Everything that can be decided from the base's small files and the headers of its weights.

    Args:
        job: its output is a folder for files on the way, which is not there yet; the result refers to it.

    Raises:
        InputError: anything that would stop the build before its real work.
        OutsideError: the Hub cannot be asked, or forbids it.
    """
    recipe, loaded, place = job.recipe, job.loaded, job.output
    name, revision = check_recipe(loaded, job.processes)
    assert recipe.push is not None
    job.say("asking the Hub")
    check_can_publish(recipe.push.repo, recipe.push.revision, recipe.push.pull_request, job.token)
    source = fetch(name, revision, weights=False)
    check_base(source, trust_remote_code=recipe.trust_remote_code)
    architecture = Architecture(read_config(source.folder))
    tokenizer = load_tokenizer(source.folder)
    job.say("checking the contrast pairs")
    layers = all_layers(loaded, architecture.block_count)
    model = steered_model(architecture, source)
    images = ImagePrompts(source.folder, tokenizer, architecture)
    prepared = prepare_vectors(loaded, tokenizer, architecture.block_count, model, images)
    refuse_images(prepared)
    job.say("reading the headers of the weight files, and choosing the route")
    with disk_errors(place, "the headers of the weight files (a temporary folder, see TMPDIR)"):
        (place / "hollow").mkdir(parents=True)
        checkpoint = HubCheckpoint(source, files_on_the_hub(source), place / "hollow")
    reading = require_complete(checkpoint, source.name)
    require_plain_names(reading)
    plan = plan_remotely(recipe, architecture, layers, checkpoint)
    names = block_names(architecture)
    about = check_fed_texts(loaded, prepared, tokenizer, architecture, fits=False)
    notes = [*reading.notes, *about, *(note for entry in prepared for note in entry.notes)]
    needed, repo = needed_files(plan, prepared, checkpoint, names), Path(recipe.push.repo)
    return RemoteBuildPlan(source, architecture, plan, prepared, repo, notes, reading, checkpoint, names, needed)


def plan_remotely(
    recipe: Recipe,
    architecture: Architecture,
    layers: list[int],
    checkpoint: HubCheckpoint,
    without: Mapping[str, str] | None = None,
) -> Plan:
    """The route that a local build would take if it can be built remotely, else the best one that can.

    Args:
        without: routes whose proof failed, and why they are out.

    Raises:
        InputError: none can; with the reason of each.
    """
    try:
        return _plan(recipe, architecture, layers, checkpoint, without or {})
    except FileNotFoundError as error:
        raise InputError(
            "the checkpoint stores a tensor that the class does not read, and only its values tell what to do about it",
            where=checkpoint.source.name,
            found=f"in {Path(str(error.filename)).name}",
            remedy=LOCAL,
            code="remote",
        ) from None


def _plan(
    recipe: Recipe,
    architecture: Architecture,
    layers: list[int],
    checkpoint: HubCheckpoint,
    without: Mapping[str, str],
) -> Plan:
    best = route_for(recipe, architecture, layers, checkpoint, without)
    refused = why_not(best, checkpoint)
    if refused is None:
        return best
    reasons = {best.route: refused}
    others: list[Plan] = []
    if without or recipe.route == "auto":
        names = [name for name in ROUTES if name not in {best.route, *without} and ROUTES[name].exact]
        for finding in survey(architecture, layers, checkpoint, targets=demanded_stacks(recipe.targets), names=names):
            reason = finding.why_not if finding.plan is None else why_not(finding.plan, checkpoint)
            if reason is None and finding.plan is not None:
                others.append(finding.plan)
            reasons[finding.name] = reason or ""
    if not others:
        raise InputError(
            f"{architecture.class_name} has no route for this edit that leaves the weight files as they are",
            where="layers " + ", ".join(map(str, layers)),
            found="; ".join(f"{name}: {reason}" for name, reason in reasons.items()),
            remedy=LOCAL,
            code="remote",
        )
    chosen = min(others, key=lambda plan: rank(plan, architecture, recipe.prefer))
    note = f"a build with an output folder would take the `{best.route}` route: remotely, {refused}"
    return replace(chosen, advice=(*chosen.advice, note))


def why_not(plan: Plan, checkpoint: HubCheckpoint) -> str | None:
    """Why a plan cannot be carried out without most of the weight files; None if it can."""
    if not plan.exact:
        return "it is fitted on the whole model"
    touched = _files(checkpoint, {*plan.renamed, *plan.dropped, *plan.grown})
    if beyond := touched - _changed(plan, checkpoint):
        return (
            f"it renames or replaces tensors in {len(beyond)} of {len(checkpoint.weight_files)} weight files, which "
            "would have to be downloaded and uploaded again"
        )
    return None


def needed_files(
    plan: Plan, prepared: Sequence[PreparedVector], checkpoint: HubCheckpoint, names: BlockNames
) -> Needed:
    """The weight files that this build downloads."""
    reads = {layer for entry in prepared if _runs_the_model(entry) for layer in entry.read_layers.values()}
    last = max(0, *reads, *plan.sites) if reads else None
    blocks = frozenset() if last is None else _files(checkpoint, tensors_for_blocks(checkpoint.tensors, names, last))
    return Needed(blocks, last, _changed(plan, checkpoint), _files(checkpoint, _read_by(plan)))


def _runs_the_model(entry: PreparedVector) -> bool:
    return entry.spec.method != "file" or entry.spec.scale == "residual"


def _changed(plan: Plan, checkpoint: HubCheckpoint) -> frozenset[str]:
    return _files(checkpoint, {tensor.name for tensor in plan.tensors if tensor.kind == "added"})


def _files(checkpoint: HubCheckpoint, tensors: Iterable[str]) -> frozenset[str]:
    return frozenset(checkpoint.tensors[name].file.name for name in tensors if name in checkpoint.tensors)


class _Asked(Exception):  # noqa: N818 - it ends a dry run of what reads
    pass


def _read_by(plan: Plan) -> set[str]:
    """The tensors of the base that the plan's new ones are made of; each is made of one."""
    found: set[str] = set()

    def read(name: str) -> Any:
        found.add(name)
        raise _Asked

    for tensor in plan.tensors:
        # Some are made of nothing, and on the meta device that costs nothing.
        with suppress(_Asked, RuntimeError, NotImplementedError), torch.device("meta"):
            if tensor.make is not None:
                tensor.make(read)
    return found
