"""Patched folders as a build writes them, from a vector that is given: nothing is captured, and nothing verified."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import hashes
from support.writing import steering_vectors

from patcher.architectures.analysis import Architecture
from patcher.build.manifest import Copied, build_manifest
from patcher.build.unpatch import Unpatched, unpatch
from patcher.card.card import render_card
from patcher.checkpoint.bin_files import convert_bin
from patcher.checkpoint.folder import SINGLE, CheckpointFolder
from patcher.checkpoint.hashes import hashing
from patcher.checkpoint.prepare import read_config
from patcher.checkpoint.source import Source
from patcher.checkpoint.staging import staged_folder
from patcher.checkpoint.steering_files import (
    MANIFEST,
)
from patcher.checkpoint.writer import Written
from patcher.errors import PatchModelError
from patcher.patched.history import carry_history, history_of
from patcher.patched.writing import write_manifest
from patcher.recipe.file import LoadedRecipe
from patcher.recipe.schema import Recipe
from patcher.routes.apply import write_plan
from patcher.routes.planner import choose_route

TEXT = "model: base\n"


def vector_of(width: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(width, generator=torch.Generator().manual_seed(seed))


def patch(
    base: Path,
    output: Path,
    vectors: dict[int, torch.Tensor],
    *,
    name: str = "love",
    hash: bool = True,
    link: bool = False,
    adapter: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[dict[str, Any], Written]:
    """Write ``base`` with ``vectors`` (layer -> [hidden]) as ``output``; its manifest and what the writer says."""
    source, checkpoint = Source(base.name, False, None, base), CheckpointFolder(base)
    if checkpoint.is_bin:
        checkpoint = convert_bin(checkpoint, output.parent / f"{output.name}-converted")
    chosen: dict[str, Any] = {
        "targets": ["transformers"],
        "route": "auto",
        "exact": True,
        "prefer": "stacks",
        **options,
    }
    architecture = Architecture(read_config(base))
    plan = choose_route(architecture, sorted(vectors), checkpoint, **chosen)
    spec = {"name": name, "method": "file", "file": "v.safetensors", "layer": sorted(vectors)}
    recipe = Recipe.model_validate({"model": str(base), "vectors": [spec]})
    loaded, found = LoadedRecipe(recipe, TEXT, base.parent / "recipe.yaml"), steering_vectors(vectors, name)
    history = history_of(base)
    with staged_folder(output) as stage, hashing(CheckpointFolder(base), hash=hash) as hashes:
        written = write_plan(plan, found, checkpoint, stage, link=link)
        carry_history(base, stage, len(history))
        files = hashes.records()
        copied = Copied(
            stage, source, checkpoint, plan, found, written, files, history, adapter=adapter,
            loader=architecture.auto_class,
        )  # fmt: skip
        manifest = build_manifest(copied, loaded)
        assert all((edit.stored_rel_error or 0.0) < 0.02 for edit in manifest.edits)
        write_manifest(stage, manifest)
        (stage / "README.md").write_text(render_card(manifest, None), encoding="utf-8")
    return manifest.as_json(), written


def width(base: Path) -> int:
    config = json.loads((base / "config.json").read_text())
    return int(config.get("hidden_size") or config["n_embd"])


def patched(base: Path, output: Path, layer: int, *, seed: int = 1, **options: Any) -> dict[str, Any]:
    return patch(base, output, {layer: vector_of(width(base), seed, 3.0)}, **options)[0]


def back(folder: Path, output: Path, **options: Any) -> Unpatched:
    """Unpatch ``folder`` as ``output``; it must not be changed by that."""
    before = hashes(folder)
    result = unpatch(folder, output, say=lambda _line: None, **options)
    assert hashes(folder) == before, "the patched folder was changed"
    return result


def refused(kind: type[PatchModelError], folder: Path, **options: Any) -> str:
    """What :func:`back` says when it refuses; nothing may be left."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises(kind) as caught:
        back(folder, folder.parent / "refused", **options)
    assert sorted(folder.parent.iterdir()) == before, "something is left"
    return str(caught.value)


def edit_manifest(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(out: Path) -> None:
        manifest = json.loads((out / MANIFEST).read_text())
        change(manifest)
        (out / MANIFEST).write_text(json.dumps(manifest))

    return apply


def odd_header(base: Path) -> None:
    """What another tool writes: blanks, another order, keys of metadata."""
    raw = (base / SINGLE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header = dict(sorted(header.items(), reverse=True))
    text = json.dumps({**header, "__metadata__": {"format": "pt", "who": "日本"}}, ensure_ascii=False, indent=1)
    (base / SINGLE).write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + raw[8 + length :])
