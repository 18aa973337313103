"""The plan of a remote build: a route that leaves most weight files as they are, and which of them are needed here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from patcher.architectures.analysis import Architecture
from patcher.build.remote_refusals import LOCAL
from patcher.checkpoint.block_names import BlockNames, tensors_for_blocks
from patcher.checkpoint.hub_folder import HubCheckpoint
from patcher.errors import InputError
from patcher.recipe.schema import Recipe
from patcher.routes.plan import Plan
from patcher.routes.planner import ROUTES, choose_route, rank, survey
from patcher.stacks.names import demanded_stacks
from patcher.vectors.finding import PreparedVector


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


def plan_remotely(
    recipe: Recipe, architecture: Architecture, layers: Sequence[int], checkpoint: HubCheckpoint, route: str
) -> Plan:
    """The route that a local build would take if it can be built remotely, else the best one that can.

    Raises:
        InputError: none can; with the reason of each.
    """
    try:
        return _plan(recipe, architecture, layers, checkpoint, route)
    except FileNotFoundError as error:
        raise InputError(
            "the checkpoint stores a tensor that the class does not read, and only its values tell what to do about it",
            where=checkpoint.source.name,
            found=f"in {Path(str(error.filename)).name}",
            remedy=LOCAL,
            code="remote",
        ) from None


def _plan(
    recipe: Recipe, architecture: Architecture, layers: Sequence[int], checkpoint: HubCheckpoint, route: str
) -> Plan:
    best = choose_route(
        architecture, layers, checkpoint, targets=recipe.targets, route=route, exact=recipe.exact, prefer=recipe.prefer
    )
    refused = why_not(best, checkpoint)
    if refused is None:
        return best
    reasons = {best.route: refused}
    others: list[Plan] = []
    if route == "auto":
        names = [name for name in ROUTES if name != best.route and ROUTES[name].exact]
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
    touched = _files(checkpoint, {*plan.renamed, *plan.dropped})
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
