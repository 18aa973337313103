"""A build that links, that does not hash, and one of a patched folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.building import build_recipe
from support.checkpoints import hashes, stored
from support.tiny_models import tiny_checkpoint, write_recipe
from support.verified import verify_folder

from patcher.build.result import BuildResult
from patcher.build.unpatch import unpatch
from patcher.patched.reading import read_manifest

LLAMA, GPT2 = "meta-llama--Llama-3.2-1B", "openai-community--gpt2"


def run(place: Path, model: str, output: str, layer: int, name: str = "love", **options: Any) -> BuildResult:
    vector = {"name": name}
    path = write_recipe(place / f"{output}.yaml", place / model, layer, place / output, vector=vector)
    return build_recipe(path, place / output, **options)


@pytest.mark.slow
def test_a_linked_build(tmp_path: Path) -> None:
    layer = tiny_checkpoint(tmp_path / "base", LLAMA, sharded=True)
    before = hashes(tmp_path / "base")
    result = run(tmp_path, "base", "out", layer, link=True)
    shards = len(list((tmp_path / "base").glob("*.safetensors")))
    assert result.placed["files"]["hard_link"]["count"] == shards
    assert result.as_json()["placed"] == result.placed
    assert result.manifest["verification"][0]["passed"]
    assert result.bytes_written < sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    run(tmp_path, "base", "out", layer, link=True, force=True)
    run(tmp_path, "base", "out", layer, force=True)
    assert hashes(tmp_path / "base") == before
    unpatch(tmp_path / "out", tmp_path / "back", say=lambda _line: None)
    assert hashes(tmp_path / "back") == before


def test_a_build_without_hashes_can_be_verified(tmp_path: Path) -> None:
    layer = tiny_checkpoint(tmp_path / "base", LLAMA)
    manifest = run(tmp_path, "base", "out", layer, hash=False).manifest
    assert {record["sha256"] for record in manifest["base"]["files"]} == {None}
    assert verify_folder(tmp_path / "out")["passed"]


def test_converted_weights_are_not_copied_again(tmp_path: Path) -> None:
    layer = tiny_checkpoint(tmp_path / "base", GPT2)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    torch.save(tensors, tmp_path / "base" / "pytorch_model.bin")
    (tmp_path / "base" / "model.safetensors").unlink()
    result = run(tmp_path, "base", "out", layer)
    assert result.placed["patched"]["count"] == 1
    assert all(file.stat().st_nlink == 1 for file in (tmp_path / "out").iterdir())


@pytest.mark.slow_but("openai-community--gpt2")
@pytest.mark.parametrize("model", [LLAMA, GPT2])
def test_a_patched_folder_is_patched_and_verified_again(tmp_path: Path, model: str) -> None:
    layer = tiny_checkpoint(tmp_path / "base", model)
    run(tmp_path, "base", "first", layer, "one")
    manifest = run(tmp_path, "first", "second", layer, "two").manifest
    assert manifest["verification"][0]["passed"] and len(manifest["history"]) == 1
    assert (
        json.loads((tmp_path / "second" / "steering.json").read_text()) == read_manifest(tmp_path / "second").as_json()
    )
    one, two = (load_file(tmp_path / name / "steering.safetensors") for name in ("first", "second"))
    name = manifest["route"]["tensors"][0]["name"]
    before = stored(tmp_path / "base").get(name, torch.zeros(64))
    assert torch.equal(
        stored(tmp_path / "second")[name], (before + one[f"one.layer.{layer}"]) + two[f"two.layer.{layer}"]
    )
    unpatch(tmp_path / "second", tmp_path / "back", say=lambda _line: None)
    assert hashes(tmp_path / "back") == hashes(tmp_path / "first")
    unpatch(tmp_path / "second", tmp_path / "all", every=True, say=lambda _line: None)
    assert hashes(tmp_path / "all") == hashes(tmp_path / "base")
