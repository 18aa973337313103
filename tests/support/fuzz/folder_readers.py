"""Patched folders: ``steering.json`` and what lies beside it, read by every command that takes one."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

from safetensors.torch import load_file
from support.fuzz import seeds
from support.fuzz.registry import reader
from support.fuzz.watch import Case

import patcher.build.reproduce as reproducing
import patcher.verify.later as later
from patcher.build.job import Job
from patcher.build.unpatch import unpatch
from patcher.card.card import render_card
from patcher.export import export_folder
from patcher.gguf.edits import edits_of_folder
from patcher.patched.reading import read_manifest
from patcher.patched.schema import Patch
from patcher.patched.stored import read_stored
from patcher.publish.contents import check_verified, published_files
from patcher.verify.comparison import FitLimits


def _patched() -> list[Case]:
    return list(seeds.patched_folders())


@reader("steering.json: stored", _patched)
def _stored(folder: Path, _out: Path) -> Any:
    manifest = read_manifest(folder)
    return read_stored(folder, manifest), _consumed(manifest)


def _consumed(patch: Patch) -> list[Any]:
    """What the runs of stock software take from a manifest."""
    route = patch.route
    written = [tensor.parameter for tensor in route.tensors]
    written += [*(route.zeros.names if route.zeros else ()), *route.derived]
    fit = None if route.exact else FitLimits.of(route.fit, 0.3, 0.15)
    return [written, route.architecture, route.blocks, route.centred, fit]


@reader("steering.json: verify", _patched)
def _verify(folder: Path, _out: Path) -> Any:
    def only_read(_stacks: Any, folder: Path, _base: Path, manifest: Any, terms: Any, **_rest: Any) -> list[Any]:
        return [read_stored(folder, manifest), _consumed(manifest), list(terms.spec.probes or ())]

    former, later.verify_in_stacks = later.verify_in_stacks, only_read  # type: ignore[assignment]
    try:
        return later.verify_folder_in(folder, ["transformers"], base=str(folder / "base"))
    finally:
        later.verify_in_stacks = former


@reader("steering.json: publish", _patched)
def _publish(folder: Path, _out: Path) -> Any:
    manifest = read_manifest(folder)
    check_verified(manifest, folder)
    return [file.read() for file in published_files(folder, manifest)]


@reader("steering.json: export", _patched)
def _export(folder: Path, out: Path) -> Any:
    done = export_folder(folder, "vector", out / "v.safetensors")
    json.dumps(done.as_json())
    return load_file(done.output)


@reader("steering.json: control vector", _patched, cost=4)
def _export_gguf(folder: Path, out: Path) -> Any:
    return export_folder(folder, "control-vector", out / "v.gguf")


@reader("steering.json: gguf", _patched)
def _edits(folder: Path, _out: Path) -> Any:
    return [edit.as_json() for edit in edits_of_folder(folder, seeds.HIDDEN, seeds.BLOCKS)]


@reader("steering.json: unpatch", lambda: list(seeds.whole_folders()), cost=4)
def _unpatch(folder: Path, out: Path) -> Any:
    done = unpatch(folder, out / "base", say=lambda _line: None)
    return json.dumps(done.as_json())


@reader("steering.json: base", _patched)
def _unpatch_to_base(folder: Path, out: Path) -> Any:
    done = unpatch(folder, out / "base", base=str(folder / "base"), say=lambda _line: None)
    return json.dumps(done.as_json())


@reader("steering.json: reproduce", lambda: list(seeds.patched_folders()))
def _reproduce(folder: Path, out: Path) -> Any:
    """With the build left out, which the base of the case is too small for."""

    def build(job: Job) -> None:
        shutil.copytree(folder, job.output, ignore=shutil.ignore_patterns("base"))
        job.recipe.model_dump_json()

    former, reproducing.build = reproducing.build, build  # type: ignore[assignment]
    with mock.patch.object(reproducing, "scratch_folder", lambda _folder: contextlib.nullcontext(out)):
        try:
            done = reproducing.reproduce(folder, base=str(folder / "base"), inputs=folder, say=lambda _line: None)
            return json.dumps(done.as_json())
        finally:
            reproducing.build = former


def _cards() -> list[Case]:
    front = "---\nlicense: apache-2.0\nlanguage:\n- en\n- no\nlicense_link: LICENSE\ntags: [a, b]\n---\n# A model\n"
    manifest = seeds.patched_folders()[0]["steering.json"]
    return [{"README.yaml": front.encode(), "steering.json": manifest}]


@reader("card", _cards)
def _card(folder: Path, _out: Path) -> Any:
    """The base's card, of which the copy's takes over licence and languages."""
    text = (folder / "README.yaml").read_bytes() if (folder / "README.yaml").is_file() else b""
    return render_card(read_manifest(folder), text.decode("utf-8", "replace"), ["LICENSE"])
