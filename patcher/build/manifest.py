"""What a build says of itself: the content of ``steering.json``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import patcher
from patcher.checkpoint.source import Source
from patcher.checkpoint.steering_files import GENERATIONS, ORIGINAL_PREFIX, tensor_key
from patcher.errors.hub import without_tokens
from patcher.patched.schema import FORMAT, Manifest, Patch
from patcher.patched.stored import read_stored
from patcher.recipe.schema import Recipe
from patcher.routes.plan import Plan
from patcher.stacks.oldest import oldest_versions
from patcher.vectors.steering_vector import SteeringVector


def build_manifest(
    stage: Path | None,
    *,
    source: Source,
    adapter: Mapping[str, Any] | None,
    files: Sequence[Mapping[str, Any]],
    recipe: Recipe,
    recipe_text: str,
    plan: Plan,
    vectors: Sequence[SteeringVector],
    originals: Collection[str],
    config_before: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    notes: Sequence[str],
    undo: Mapping[str, Any] | None = None,
    history: Sequence[Patch] = (),
    recipe_folder: Path | None = None,
    written_for: Collection[str] = (),
    remote: Mapping[str, Any] | None = None,
) -> Manifest:
    """Everything that is needed to rebuild the folder, verify it, or take the steering out again.

    ``base.path`` and ``recipe.folder`` are the only local paths besides those in the recipe; publishing drops them.

    Args:
        stage: the folder with the copy and its ``steering.safetensors``, from which it is read back what its tensors
            really hold. None: nothing was written, and nothing is said of that.
        originals: tensors whose former values are kept in ``steering.safetensors``.
        config_before: the base's config.json.
        undo: what the writer noted, see :func:`patcher.checkpoint.undo.undo_record`.
        history: of a base that is a patched folder, see :func:`patcher.patched.history.history_of`.
        recipe_folder: what paths in the recipe are relative to.
        written_for: names of the vectors for which the model wrote responses, which are kept beside them.
        remote: of a copy that is made on the Hub, see :class:`patcher.patched.schema.Remote`.

    Raises:
        InputError: the files in ``stage`` do not hold what the plan says.
    """
    edits, route = _edits(recipe, plan, vectors, written_for), _route(plan, originals, config_before)
    if stage is not None:
        stored = read_stored(stage, Patch.model_validate({"edits": edits, "route": route}), partial=remote is not None)
        edits = [{**edit, "stored_rel_error": stored[edit["layer"]].rel_error} for edit in edits]
    content = {
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
        "edits": edits,
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
        **({} if remote is None else {"remote": remote}),
    }
    return Manifest.of(Patch.model_validate(content), history)


def _edits(
    recipe: Recipe, plan: Plan, vectors: Sequence[SteeringVector], written_for: Collection[str]
) -> list[dict[str, Any]]:
    specs = {spec.name: spec for spec in recipe.vectors}
    return [
        {
            "name": vector.name,
            "layer": vector.layer,
            "site": plan.sites[vector.layer],
            "read_layer": vector.read_layer,
            "method": specs[vector.name].method,
            "coefficient": vector.coefficient,
            "scale": specs[vector.name].scale,
            "tensor": tensor_key(vector.name, vector.layer),
            "norm": float(vector.values.norm()),
            "residual_norm": vector.residual_norm,
            **({"generations": GENERATIONS} if vector.name in written_for else {}),
        }
        for vector in vectors
    ]


def _route(plan: Plan, originals: Collection[str], config_before: Mapping[str, Any]) -> dict[str, Any]:
    route = plan.as_json()
    for tensor in route["tensors"]:
        tensor["original"] = ORIGINAL_PREFIX + tensor["name"] if tensor["name"] in originals else None
    changed = config_before if plan.config is not None else plan.config_changes
    route["config_before"] = {key: config_before.get(key) for key in changed}
    route["oldest"] = oldest_versions(plan.architecture, plan.stacks, own_bias=plan.is_own_bias)
    return route
