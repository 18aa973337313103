"""A patched folder that is patched once more: the vectors add up, and what the first patch was stays known."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import hashes, hooked, load, stored
from support.patched_folders import back, patch, patched, refused, vector_of, width
from support.tiny_models import VOCABULARY, tiny_checkpoint

from patcher.checkpoint.steering_files import MANIFEST, VECTORS, numbered
from patcher.errors import InputError
from patcher.patched.history import history_of
from patcher.patched.reading import read_manifest
from patcher.patched.stored import read_stored

LLAMA, GPT2, QWEN2 = "meta-llama--Llama-3.2-1B", "openai-community--gpt2", "Qwen--Qwen2.5-0.5B"
QWEN3 = "Qwen--Qwen3-8B"


def patched_twice(
    tmp_path: Path, model: str, second_layer: int = 0, **options: Any
) -> tuple[int, torch.Tensor, torch.Tensor]:
    """``base``, ``first`` and ``second`` in tmp_path; the layer, and both vectors."""
    layer = tiny_checkpoint(tmp_path / "base", model, sharded=True, **options)
    one, two = (vector_of(width(tmp_path / "base"), seed, 3.0) for seed in (1, 2))
    patch(tmp_path / "base", tmp_path / "first", {layer: one}, name="one")
    patch(tmp_path / "first", tmp_path / "second", {layer + second_layer: two}, name="two")
    return layer, one, two


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(24).reshape(2, 12) * 7 % VOCABULARY
    with torch.no_grad():
        return torch.as_tensor(model(ids).logits.float())


@pytest.mark.parametrize("model", [LLAMA, GPT2, QWEN2])
def test_vectors_add_up_where_they_share_the_slot(tmp_path: Path, model: str) -> None:
    layer, one, two = patched_twice(tmp_path, model)
    name = read_manifest(tmp_path / "second").route.tensors[0].name
    assert name == read_manifest(tmp_path / "first").route.tensors[0].name
    before = stored(tmp_path / "base").get(name, torch.zeros_like(one))
    # The very sum of fp32, bit for bit.
    assert torch.equal(stored(tmp_path / "second")[name], (before + one) + two)
    base, both = load(tmp_path / "base"), load(tmp_path / "second")
    with hooked(base, layer, one + two):
        expected = logits(base)
    assert (logits(both) - expected).abs().max() < 1e-4
    assert (logits(both) - logits(load(tmp_path / "first"))).abs().max() > 0.1
    assert (logits(both) - logits(load(tmp_path / "base"))).abs().max() > 0.1


def test_half_precision_rounds_each_time_and_says_by_how_much(tmp_path: Path) -> None:
    layer, one, two = patched_twice(tmp_path, GPT2, dtype=torch.bfloat16)
    name = read_manifest(tmp_path / "second").route.tensors[0].name
    before = stored(tmp_path / "base")[name].float()
    now = stored(tmp_path / "second")[name]
    assert torch.equal(now, ((before + one).bfloat16().float() + two).bfloat16())
    held = read_stored(tmp_path / "second", read_manifest(tmp_path / "second"))[layer]
    assert 0 < held.rel_error < 0.02
    assert torch.equal(held.stored, (now.double() - (before + one).bfloat16().double()).float())


def test_another_layer_is_another_slot(tmp_path: Path) -> None:
    layer, one, two = patched_twice(tmp_path, LLAMA, second_layer=1)
    tensors = stored(tmp_path / "second")
    assert torch.equal(tensors[f"model.layers.{layer}.mlp.down_proj.bias"], one)
    assert torch.equal(tensors[f"model.layers.{layer + 1}.mlp.down_proj.bias"], two)
    base = load(tmp_path / "base")
    with hooked(base, layer, one), hooked(base, layer + 1, two):
        expected = logits(base)
    assert (logits(load(tmp_path / "second")) - expected).abs().max() < 1e-4


def test_what_the_first_patch_left_is_under_a_number(tmp_path: Path) -> None:
    layer = tiny_checkpoint(tmp_path / "base", LLAMA)
    vectors = {name: vector_of(width(tmp_path / "base"), seed) for seed, name in enumerate(("one", "two"))}
    patch(tmp_path / "base", tmp_path / "first", {layer: vectors["one"]}, name="one")
    (tmp_path / "first" / "steering_generations.jsonl").write_text("{}\n")
    patch(tmp_path / "first", tmp_path / "second", {layer: vectors["two"]}, name="two")
    second = tmp_path / "second"
    assert {file.name for file in second.glob("steering*")} == {
        "steering.json", "steering.safetensors", "steering.1.safetensors", "steering_generations.1.jsonl",
    }  # fmt: skip
    # The new vectors are the new patch's alone.
    assert load_file(second / VECTORS).keys() == {
        f"two.layer.{layer}", f"original/model.layers.{layer}.mlp.down_proj.bias"
    }  # fmt: skip
    assert (second / "steering.1.safetensors").read_bytes() == (tmp_path / "first" / VECTORS).read_bytes()
    manifest, first = read_manifest(second).as_json(), read_manifest(tmp_path / "first").as_json()
    assert [edit["name"] for edit in manifest["edits"]] == ["two"]
    assert manifest["history"] == [{key: value for key, value in first.items() if key != "history"}]
    for entry in manifest["history"]:
        assert {"tool_version", "base", "edits", "route"} <= entry.keys()
    # The base of the second patch is the first one's folder, by its hashes.
    files = {record["name"]: record["sha256"] for record in manifest["base"]["files"]}
    now = hashes(tmp_path / "first")
    assert files.items() <= now.items()
    assert not [name for name in files if name.startswith("steering")]


def test_a_base_that_was_never_patched_has_no_history(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "base", LLAMA)
    assert history_of(tmp_path / "base") == []
    (tmp_path / "base" / MANIFEST).write_text('{"steering": "of a car"}')
    assert history_of(tmp_path / "base") == []


def test_a_history_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    layer = tiny_checkpoint(tmp_path / "base", LLAMA)
    patch(tmp_path / "base", tmp_path / "first", {layer: vector_of(width(tmp_path / "base"))})
    manifest = json.loads((tmp_path / "first" / MANIFEST).read_text())
    (tmp_path / "first" / MANIFEST).write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(InputError, match="does not know"):
        history_of(tmp_path / "first")


def test_vectors_that_are_gone_are_not_invented(tmp_path: Path) -> None:
    layer = tiny_checkpoint(tmp_path / "base", GPT2)
    vector = vector_of(width(tmp_path / "base"))
    patch(tmp_path / "base", tmp_path / "first", {layer: vector})
    (tmp_path / "first" / VECTORS).unlink()
    patch(tmp_path / "first", tmp_path / "second", {layer: vector})
    assert not (tmp_path / "second" / "steering.1.safetensors").exists()


def test_stray_files_of_such_names_do_not_travel(tmp_path: Path) -> None:
    layer = tiny_checkpoint(tmp_path / "base", LLAMA)
    save_file({"x": torch.ones(1)}, tmp_path / "base" / "steering.7.safetensors")
    shutil.copy(tmp_path / "base" / "steering.7.safetensors", tmp_path / "base" / VECTORS)
    patch(tmp_path / "base", tmp_path / "out", {layer: vector_of(width(tmp_path / "base"))})
    assert {file.name for file in (tmp_path / "out").glob("steering*")} == {"steering.json", VECTORS}
    assert "x" not in load_file(tmp_path / "out" / VECTORS)


def test_numbers_in_names() -> None:
    assert numbered("steering.safetensors", 1) == "steering.1.safetensors"
    assert numbered("steering_generations.jsonl", 12) == "steering_generations.12.jsonl"


# Undone again


@pytest.fixture(params=["flag and native", "native, bf16", "carrier twice"])
def twice(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, Path]:
    model, dtype = {
        "flag and native": (LLAMA, torch.bfloat16), "native, bf16": (GPT2, torch.bfloat16),
        "carrier twice": (QWEN3, torch.float32),
    }[request.param]  # fmt: skip
    base, first, second = (tmp_path / name for name in ("base", "first", "second"))
    layer = tiny_checkpoint(base, model, dtype=dtype, sharded=True)
    patched(base, first, layer, seed=1, name="one")
    (first / "steering_generations.jsonl").write_text('{"what": "the first was made of"}\n')
    patched(first, second, layer, seed=2, name="two")
    return base, first, second


def test_the_last_patch_is_undone(twice: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, first, second = twice
    result = back(second, tmp_path / "back")
    assert [edit["name"] for edit in result.removed] == ["two"]
    assert [edit["name"] for edit in result.left] == ["one"]
    assert result.notes
    # Down to the manifest, the vectors and the card of the first.
    assert hashes(tmp_path / "back") == hashes(first)
    again = back(tmp_path / "back", tmp_path / "base-again")
    assert hashes(tmp_path / "base-again") == hashes(base)
    assert not again.left


def test_all_patches_are_undone(twice: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _first, second = twice
    result = back(second, tmp_path / "back", every=True)
    assert [edit["name"] for edit in result.removed] == ["two", "one"]
    assert result.left == []
    assert hashes(tmp_path / "back") == hashes(base)
    assert not list(tmp_path.glob(".*"))
    # Not even its intermediate files are the patched folder's.
    inodes = {file.stat().st_ino for file in second.iterdir()}
    assert not any(file.stat().st_ino in inodes for file in (tmp_path / "back").iterdir())


def test_with_the_base_of_either_patch(twice: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, first, second = twice
    back(second, tmp_path / "one", base=str(first))
    assert hashes(tmp_path / "one") == hashes(first)
    back(second, tmp_path / "none", base=str(base), every=True)
    assert hashes(tmp_path / "none") == hashes(base)
    assert "not the base" in refused(InputError, second, base=str(base))


def test_three_times(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(4)]
    layer = tiny_checkpoint(folders[0], GPT2, dtype=torch.float16)
    for number in range(3):
        patched(folders[number], folders[number + 1], layer, seed=number, name=f"v{number}")
    names = {file.name for file in folders[3].glob("steering*")}
    assert names == {"steering.json", VECTORS, "steering.1.safetensors", "steering.2.safetensors"}
    manifest = json.loads((folders[3] / MANIFEST).read_text())
    assert [entry["edits"][0]["name"] for entry in manifest["history"]] == ["v0", "v1"]
    assert not any("history" in entry for entry in manifest["history"])
    assert manifest["edits"][0]["name"] == "v2"
    for number in (2, 1, 0):
        back(folders[number + 1], tmp_path / f"back{number}")
        assert hashes(tmp_path / f"back{number}") == hashes(folders[number])
    back(folders[3], tmp_path / "all", every=True)
    assert hashes(tmp_path / "all") == hashes(folders[0])
    shutil.rmtree(folders[1])
    back(folders[3], tmp_path / "all-again", every=True)
    assert hashes(tmp_path / "all-again") == hashes(folders[0])


def test_what_a_copy_holds_is_recorded_even_where_no_number_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verification is what refuses such a copy, in words; the manifest that it is given must be there."""
    layer = tiny_checkpoint(tmp_path / "base", LLAMA)

    def broken(*arguments: Any, **options: Any) -> Any:
        return {at: replace(held, rel_error=float("inf")) for at, held in read_stored(*arguments, **options).items()}

    monkeypatch.setattr("patcher.build.manifest.read_stored", broken)
    manifest, _ = patch(tmp_path / "base", tmp_path / "copy", {layer: vector_of(width(tmp_path / "base"))})
    assert manifest["edits"][0]["stored_rel_error"] is None
