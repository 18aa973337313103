"""``steering.json``: what was done to which base, and how it was verified."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import patcher
from patcher.checkpoint.copying import place_file
from patcher.checkpoint.folder import read_json_object
from patcher.checkpoint.source import Source
from patcher.checkpoint.staging import MANIFEST
from patcher.disk.links import require_inside
from patcher.errors.hub import without_tokens
from patcher.patched.stored import VECTORS, read_manifest
from patcher.recipe.schema import Recipe
from patcher.routes.plan import Plan
from patcher.vectors.files import ORIGINAL_PREFIX
from patcher.vectors.persona import GENERATIONS
from patcher.vectors.steering_vector import SteeringVector

FORMAT = 1
CARRIED = (VECTORS, GENERATIONS)
"""Files of a patch that a later patch of the patched folder takes along, under a number."""


def tensor_key(vector: SteeringVector) -> str:
    """The vector's key in ``steering.safetensors``."""
    return f"{vector.name}.layer.{vector.layer}"


def build_manifest(
    *,
    source: Source,
    adapter: Mapping[str, Any] | None,
    files: Sequence[Mapping[str, Any]],
    recipe: Recipe,
    recipe_text: str,
    plan: Plan,
    vectors: Sequence[SteeringVector],
    originals: Mapping[str, torch.Tensor],
    stored_rel_errors: Mapping[int, float],
    config_before: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    notes: Sequence[str],
    undo: Mapping[str, Any] | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    recipe_folder: Path | None = None,
) -> dict[str, Any]:
    """Everything that is needed to rebuild the folder, verify it, or take the steering out again.

    ``base.path`` and ``recipe.folder`` are the only local paths besides those in the recipe; publishing drops them.

    Args:
        undo: what the writer noted, see :func:`patcher.checkpoint.undo.undo_record`.
        history: of a base that is a patched folder, see :func:`history_of`.
        recipe_folder: what paths in the recipe are relative to.
    """
    methods = {spec.name: spec for spec in recipe.vectors}
    route = plan.as_json()
    for tensor in route["tensors"]:
        tensor["original"] = ORIGINAL_PREFIX + tensor["name"] if tensor["name"] in originals else None
    changed = config_before if plan.config is not None else plan.config_changes
    route["config_before"] = {key: config_before.get(key) for key in changed}
    return {
        "format": FORMAT,
        "tool_version": patcher.__version__,
        "base": {
            "model": source.name,
            "hub": source.hub,
            "revision": source.revision,
            "path": None if source.hub else str(source.folder.resolve()),
            "adapter": dict(adapter) if adapter else None,
            "files": list(files),
        },
        "edits": [
            {
                "name": vector.name,
                "layer": vector.layer,
                "site": plan.sites[vector.layer],
                "read_layer": vector.read_layer,
                "method": methods[vector.name].method,
                "coefficient": vector.coefficient,
                "scale": methods[vector.name].scale,
                "tensor": tensor_key(vector),
                "norm": float(vector.values.norm()),
                "residual_norm": vector.residual_norm,
                "stored_rel_error": stored_rel_errors[vector.layer],
            }
            for vector in vectors
        ],
        "route": route,
        "verification": [],
        "evaluation": dict(evaluation) if evaluation else None,
        "recipe": {
            "text": without_tokens(recipe_text),
            "resolved": recipe.model_dump(mode="json"),
            "folder": None if recipe_folder is None else str(recipe_folder.resolve()),
        },
        "notes": list(notes),
        "undo": dict(undo) if undo is not None else None,
        "history": list(history),
    }


def history_of(folder: Path) -> list[dict[str, Any]]:
    """The patches that a base went through before, the earliest first; none for one that is not a patched folder.

    Each entry is the manifest that the patch left, without a history of its own.

    Raises:
        InputError: the folder was patched by a newer version, or its ``steering.json`` is damaged.
    """
    if not (folder / MANIFEST).is_file():
        return []
    if not {"format", "edits", "route"} <= read_json_object(folder / MANIFEST).keys():
        # Another tool's file of this name.
        return []
    manifest = read_manifest(folder)
    return [*manifest.pop("history", []), manifest]


def numbered(name: str, number: int) -> str:
    """What a file of the ``number``-th patch (from 1) is called in the folder of a later one."""
    stem, dot, ending = name.partition(".")
    return f"{stem}.{number}{dot}{ending}"


def carry_history(folder: Path, stage: Path, patches: int) -> int:
    """Take the vectors (and what they were made of) of all patches of ``folder`` along; the bytes written.

    Args:
        folder: a patched folder that is patched once more, or the one that is then unpatched.
        stage: the folder that is written.
        patches: how many patches ``folder`` has: the length of its :func:`history_of`.

    Raises:
        InputError: one of them is a link out of the folder.
    """
    written = 0
    for number in range(1, patches + 1):
        for name in CARRIED:
            source = folder / (name if number == patches else numbered(name, number))
            if source.is_file():
                require_inside(source, folder)
                written += place_file(source, stage / numbered(name, number)).written
    return written


def give_back_history(folder: Path, stage: Path, history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write what an earlier patch had written besides the model; its manifest.

    Args:
        folder: the folder of a later patch.
        stage: the folder that becomes the earlier one.
        history: of the later patch, up to and with the earlier one.

    Raises:
        InputError: a file is a link out of the folder.
    """
    count = len(history)
    for number in range(1, count + 1):
        for name in CARRIED:
            source = folder / numbered(name, number)
            if source.is_file():
                require_inside(source, folder)
                place_file(source, stage / (name if number == count else numbered(name, number)))
    manifest = {**history[-1], "history": list(history[:-1])}
    (stage / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")
    return manifest


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """``steering.json`` as it is written."""
    return json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
