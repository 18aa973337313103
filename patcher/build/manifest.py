"""What a build says of itself: the content of ``steering.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import patcher
from patcher.architectures.decoder import decoder_part, value_at
from patcher.build.inputs import input_records
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.source import Source
from patcher.checkpoint.steering_files import GENERATIONS, ORIGINAL_PREFIX, tensor_key
from patcher.checkpoint.writer import Written
from patcher.disk.json_files import finite_or_null
from patcher.errors.hub import without_tokens
from patcher.patched.failed_route import FailedRoute
from patcher.patched.route import CAUSAL_LM
from patcher.patched.schema import FORMAT, Manifest, Patch
from patcher.patched.stored import read_stored
from patcher.recipe.file import LoadedRecipe
from patcher.recipe.schema import Recipe
from patcher.routes.plan import Plan
from patcher.stacks.oldest import oldest_versions
from patcher.vectors.prepared import PreparedVector
from patcher.vectors.steering_vector import SteeringVector


@dataclass(frozen=True)
class Copied:
    """A copy that is written, and how it came to be.

    Attributes:
        stage: the folder with the copy and its ``steering.safetensors``.
        source: the base, as it was given.
        base: the base, as it was copied; an adapter is merged.
        plan: the route.
        vectors: the steering vectors.
        written: what the writer did.
        files: the base's files, {name, size, sha256} each.
        history: the patches that the base went through before, see :func:`patcher.patched.history.history_of`.
        notes: what the user should know.
        adapter: what was merged, see :func:`patcher.checkpoint.prepare.adapter_record`.
        stripped: what was left out of the names of the base's tensors.
        environment: what computed the vectors, see :func:`patcher.build.inputs.environment`.
        evaluation: what was measured, or None.
        prepared: the recipe's vectors with the pairs that they were made of.
        responses: of `method: persona`, every response, which is kept beside the vectors.
        failed: the exact routes that were tried before this one.
        remote: of a copy that is made on the Hub, see :class:`patcher.patched.schema.Remote`.
        loader: the stock loader of the base, and of the copy.
    """

    stage: Path
    source: Source
    base: CheckpointFolder
    plan: Plan
    vectors: Sequence[SteeringVector]
    written: Written
    files: Sequence[Mapping[str, Any]]
    history: Sequence[Patch] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    adapter: Mapping[str, Any] | None = None
    stripped: Sequence[str] = ()
    evaluation: Mapping[str, Any] | None = None
    prepared: Sequence[PreparedVector] = ()
    responses: Sequence[Mapping[str, Any]] = ()
    failed: Sequence[FailedRoute] = ()
    remote: Mapping[str, Any] | None = None
    loader: str = CAUSAL_LM


def build_manifest(copied: Copied, loaded: LoadedRecipe) -> Manifest:
    """Everything that is needed to rebuild the folder, verify it, or take the steering out again.

    ``base.path`` and ``recipe.folder`` are the only local paths besides those in the recipe; publishing drops them.

    Raises:
        InputError: the files in the stage do not hold what the plan says.
    """
    edits, route = _edits(copied, loaded.recipe), _route(copied)
    patch = Patch.model_validate({"edits": edits, "route": route})
    stored = read_stored(copied.stage, patch, partial=copied.remote is not None)
    source = copied.source
    content = {
        "format": FORMAT,
        "tool_version": patcher.__version__,
        "base": {
            "model": source.name,
            "hub": source.hub,
            "revision": source.revision,
            "path": None if source.hub else str(source.folder.resolve()),
            "adapter": copied.adapter,
            **({"stripped": list(copied.stripped)} if copied.stripped else {}),
            "files": list(copied.files),
        },
        "edits": [{**edit, "stored_rel_error": finite_or_null(stored[edit["layer"]].rel_error)} for edit in edits],
        "route": route,
        "verification": [],
        "evaluation": copied.evaluation,
        "recipe": {
            "text": without_tokens(loaded.text),
            "resolved": loaded.recipe.model_dump(mode="json"),
            "folder": str(loaded.folder.resolve()),
        },
        "inputs": input_records(copied.prepared),
        "environment": dict(copied.environment),
        "notes": list(copied.notes),
        "undo": copied.written.undo,
        **({} if copied.remote is None else {"remote": copied.remote}),
    }
    return Manifest.of(Patch.model_validate(content), copied.history)


def _edits(copied: Copied, recipe: Recipe) -> list[dict[str, Any]]:
    specs = {spec.name: spec for spec in recipe.vectors}
    answered = {response["vector"] for response in copied.responses}
    prepared = {entry.spec.name: entry for entry in copied.prepared}
    return [
        {
            "name": vector.name,
            "layer": vector.layer,
            "site": copied.plan.sites[vector.layer],
            "read_layer": vector.read_layer,
            "method": specs[vector.name].method,
            "coefficient": vector.coefficient,
            "scale": specs[vector.name].scale,
            "tensor": tensor_key(vector.name, vector.layer),
            "norm": float(vector.values.norm()),
            "residual_norm": vector.residual_norm,
            **({"generations": GENERATIONS} if vector.name in answered else {}),
            **_made_of(vector, prepared.get(vector.name)),
            **({} if vector.source is None else {"source": vector.source}),
        }
        for vector in copied.vectors
    ]


def _made_of(vector: SteeringVector, entry: PreparedVector | None) -> dict[str, Any]:
    if entry is None or not entry.pair_count:
        return {}
    made_of, of = entry.pair_count, entry.pair_count + entry.held_out_count
    cosine = vector.cosine_with_measured
    unit: dict[str, Any] = {} if entry.lists is None else {"unit": "texts"}
    if entry.image_count:
        unit["images"] = entry.image_count
    if cosine is None:
        return {"made_of": {"count": made_of, "of": of, **unit}}
    return {"made_of": {"count": of, "of": of, "measured": made_of, "cosine": cosine, **unit}}


def _route(copied: Copied) -> dict[str, Any]:
    plan, stated = copied.plan, copied.base.config
    route = plan.as_json()
    for tensor in route["tensors"]:
        name = tensor["name"]
        tensor["original"] = ORIGINAL_PREFIX + name if name in copied.written.originals else None
    if copied.failed:
        route["failed_before"] = [failed.as_json() for failed in copied.failed]
    if copied.loader != CAUSAL_LM:
        route["loader"] = copied.loader
    changed = decoder_part(stated) if plan.config is not None else plan.config_changes
    route["config_before"] = {key: value_at(stated, key) for key in changed}
    route["oldest"] = oldest_versions(plan.architecture, plan.stacks, own_bias=plan.is_own_bias)
    return route
