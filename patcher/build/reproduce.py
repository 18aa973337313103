"""Build a patched folder again, from the recipe and the base that it names, and compare every file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import patcher
from patcher.build.inputs import reasons
from patcher.build.job import Job
from patcher.build.local import build
from patcher.build.texts import PICTURES
from patcher.checkpoint.difference import compare_files
from patcher.checkpoint.hashes import hashes_of
from patcher.checkpoint.safetensors_file import metadata_of, raw_header
from patcher.checkpoint.staging import scratch_folder
from patcher.checkpoint.steering_files import CARD, MANIFEST
from patcher.errors import InputError
from patcher.errors.causes import cause_of
from patcher.patched.base import recorded_adapter, recorded_base, require_recorded
from patcher.patched.reading import read_manifest
from patcher.patched.schema import Manifest, Patch
from patcher.progress.stage import Say
from patcher.recipe.file import LoadedRecipe
from patcher.recipe.schema import Recipe
from patcher.stacks.names import TRANSFORMERS

_MEASURED = ("reason", "advice", "oldest")
"""Of a route: what says how it was chosen, with numbers of the machine, and nothing of what is written."""


@dataclass
class Reproduced:
    """How the folder that was built again compares with the first one.

    Attributes:
        identical: files that are byte for byte the same.
        reordered: safetensors files that are, but for the order of the keys in their headers.
        different: file -> the largest absolute difference of its numbers (null where that cannot be said).
        missing: files of the folder that were not built again.
        unexpected: files that the folder does not have.
        manifest: keys of ``steering.json`` that differ, apart from what is measured anew (verification, evaluation).
        notes: what the user should know.
    """

    folder: Path
    identical: list[str] = field(default_factory=list)
    reordered: list[str] = field(default_factory=list)
    different: dict[str, float | None] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    manifest: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        return not (self.different or self.missing or self.unexpected or self.manifest)

    def as_json(self) -> dict[str, Any]:
        return {"reproduced": self.same, **vars(self), "folder": str(self.folder)}


def reproduce(
    folder: Path,
    *,
    base: str | None = None,
    adapter: str | None = None,
    inputs: Path | None = None,
    trust_remote_code: bool = False,
    say: Say = print,
) -> Reproduced:
    """Build ``folder`` again beside itself, compare, and remove what was built.

    Args:
        folder: what a build wrote; it is not changed.
        base: where the base is, if not where the manifest says: a folder or a Hub id.
        adapter: the same for a merged adapter.
        inputs: what paths in the recipe are relative to, if not to the folder that the manifest names.
        trust_remote_code: allow code that comes with the base to run, where the recipe asks for it.

    Raises:
        InputError: the manifest holds no recipe, asks for trust that was not given, or what it needs is not there or
            not what it was.
        CheckFailed, OutsideError: as from a build.
    """
    manifest = read_manifest(folder)
    recipe, text = _recipe(manifest, folder)
    if recipe.trust_remote_code and not trust_remote_code:
        # Who wrote the folder must not decide what code is run here.
        raise InputError(
            "the recipe in the folder asks to run Python code that comes with the model",
            where=f"{folder / MANIFEST}: recipe.resolved.trust_remote_code",
            remedy="if you trust it: --trust-remote-code",
            code="remote_code",
        )
    source = recorded_base(manifest, base, say)
    require_recorded(source.folder, manifest, say)
    merged = recorded_adapter(manifest, adapter)
    model = f"{source.name}@{source.revision}" if source.hub else str(source.folder.resolve())
    changes: dict[str, Any] = {"model": model, "push": None}
    if merged is not None:
        changes["adapter"] = str(merged.folder.resolve())
    changes["verify"] = recipe.verify.model_copy(update={"stacks": [TRANSFORMERS]})
    recipe = recipe.model_copy(update=changes)
    with scratch_folder(folder) as scratch:
        again = scratch / folder.resolve().name
        # Nothing that was captured before: that the vector comes out again is part of the question.
        loaded = LoadedRecipe(recipe, text, _inputs(manifest, inputs) / "recipe.yaml")
        build(Job(loaded, again, say, cache=False))
        return _compared(folder, manifest, again, say)


def _recipe(patch: Patch, folder: Path) -> tuple[Recipe, str]:
    record = patch.recipe
    if record.resolved is None:
        raise InputError("the manifest holds no recipe", where=str(folder / MANIFEST), remedy="build the folder again")
    try:
        return Recipe.model_validate(record.resolved), record.text or ""
    except ValueError as error:
        raise InputError(
            "the recipe in the manifest is not one that this version reads",
            where=f"{folder / MANIFEST}: recipe.resolved",
            found=cause_of(error),
            remedy=f"use the version that wrote it: {patch.tool_version}",
        ) from None


def _inputs(patch: Patch, given: Path | None) -> Path:
    recorded = patch.recipe.folder
    chosen = given or (Path(recorded) if recorded else Path.cwd())
    if not chosen.is_dir():
        raise InputError(
            "the folder that the recipe's paths are relative to is not where it was",
            where="steering.json: recipe.folder",
            found=str(chosen),
            remedy="say where the recipe's inputs are: --inputs DIR",
        )
    return chosen


def _compared(folder: Path, patch: Manifest, again: Path, say: Say) -> Reproduced:
    result = Reproduced(folder)
    before, after = _files(folder), _files(again)
    result.missing = sorted(before.keys() - after.keys())
    result.unexpected = sorted(after.keys() - before.keys())
    both = sorted(before.keys() & after.keys())
    names = [Path(name) for name in both]
    first = hashes_of(folder, names, say, "hashing the folder")
    second = hashes_of(again, names, say, "hashing what was built again")
    for name in both:
        if first[name] == second[name]:
            result.identical.append(name)
        elif not name.endswith(".safetensors"):
            result.different[name] = None
        else:
            found = compare_files(folder / name, again / name)
            metadata = [metadata_of(raw_header(where / name)) for where in (folder, again)]
            if found.nothing and metadata[0] == metadata[1]:
                # The stock writer puts the keys of a header's metadata in any order.
                result.reordered.append(name)
            else:
                result.different[name] = found.largest
    built = read_manifest(again)
    result.manifest = _differing(_reproducible(patch), _reproducible(built))
    if not result.same:
        result.notes += reasons(patch, built)
    if patch.tool_version != patcher.__version__:
        result.notes.append(f"the folder was written by version {patch.tool_version}, not {patcher.__version__}")
    return result


def _files(folder: Path) -> dict[str, Path]:
    """All but what says when and how fast, or what was measured: the card, its pictures, and the manifest, which is
    compared by its content."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: path
        for name, path in found.items()
        if not (name in (CARD, MANIFEST) or name.startswith(".") or name in PICTURES.values())
    }


def _reproducible(manifest: Manifest) -> dict[str, Any]:
    """What a second build must say again."""
    route = {key: value for key, value in manifest.route.as_json().items() if key not in _MEASURED}
    return {
        "base.files": {record.name: record.sha256 for record in manifest.base.files or [] if record.sha256},
        "edits": [edit.as_json() for edit in manifest.edits],
        "recipe.text": manifest.recipe.text,
        "undo": manifest.undo,
        "history": manifest.history,
        **{f"route.{key}": value for key, value in route.items()},
    }


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    # The hashes of one of the two may not have been computed.
    both = {key for key in first.keys() | second.keys() if key not in ("base.files", "edits")}
    wrong = [key for key in both if first.get(key) != second.get(key)]
    # Earlier versions recorded less of an edit.
    old, new = first["edits"], second["edits"]
    again = [{key: edit.get(key) for key in was} for was, edit in zip(old, new, strict=False)]
    wrong += ["edits"] * (len(old) != len(new) or old != again)
    known = first["base.files"].keys() & second["base.files"].keys()
    wrong += ["base.files"] * any(first["base.files"][name] != second["base.files"][name] for name in known)
    return sorted(wrong)
