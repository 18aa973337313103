"""``steering.json``: what was done to which base, and how it was verified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import patcher
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.source import Source
from patcher.recipe import Recipe
from patcher.routes.plan import Plan
from patcher.vectors.files import ORIGINAL_PREFIX
from patcher.vectors.steering_vector import SteeringVector

FORMAT = 1


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
) -> dict[str, Any]:
    """Everything that is needed to rebuild the folder, verify it, or take the steering out again.

    ``base.path`` is the only local path besides those in the recipe; publishing drops it.
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
        "recipe": {"text": recipe_text, "resolved": recipe.model_dump(mode="json")},
        "notes": list(notes),
    }


def base_files(base: CheckpointFolder) -> list[Path]:
    """The base's files that the result depends on, relative: weights, index, config, side files."""
    names = [Path("config.json"), *(Path(name) for name in base.weight_files)]
    names += [Path(name) for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json")]
    present = [name for name in names if (base.path / name).is_file()]
    return sorted({*present, *base.side_files()})
