"""The copy: every byte that should change does, no other does, and stock transformers loads the result."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.checkpoints import HIDDEN, LAYERS, assert_same_but, hashes, hooked, load, logits, same_bits, save, stored

from patcher.checkpoint.folder import INDEX, SINGLE, CheckpointFolder
from patcher.checkpoint.safetensors_file import read_tensor
from patcher.checkpoint.writer import Written, write_copy

Checkpoint = Callable[..., Path]
FLAG = {"mlp_bias": True}
BIAS = "model.layers.{}.mlp.{}_proj.bias"


def biases(vector: torch.Tensor, layer: int = 1, width: int = 48) -> dict[str, torch.Tensor]:
    """What the flag makes the class create: the vector, and zeros for the rest."""
    created = {}
    for block in range(LAYERS):
        for name, size in (("gate", width), ("up", width), ("down", HIDDEN)):
            created[BIAS.format(block, name)] = torch.zeros(size)
    created[BIAS.format(layer, "down")] = vector
    return created


def copy(base: Path, stage: Path, **keys: Any) -> Written:
    stage.mkdir()
    before = hashes(base)
    given: dict[str, Any] = {"created": {}, "replaced": {}, "config_changes": {}, **keys}
    written = write_copy(CheckpointFolder(base), stage, **given)
    assert hashes(base) == before, "the base was touched"
    assert all(stat.S_IMODE(item.stat().st_mode) == 0o644 for item in stage.rglob("*") if item.is_file())
    shared = written.placed["files"].get("reflink", {"bytes": 0})["bytes"]
    assert written.bytes_written + shared >= sum(item.stat().st_size for item in stage.rglob("*") if item.is_file())
    return written


def assert_index_is_true(folder: Path) -> dict[str, Any]:
    index = json.loads((folder / INDEX).read_text())
    found: dict[str, str] = {}
    for file in folder.glob("*.safetensors"):
        found.update(dict.fromkeys(load_file(file), file.name))
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(folder).values())
    return index


@pytest.fixture
def vector() -> torch.Tensor:
    return torch.randn(HIDDEN, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_created_tensors_get_a_shard_of_their_own(
    checkpoint: Checkpoint, tmp_path: Path, vector: torch.Tensor, dtype: str, sharded: bool
) -> None:
    base, stage = checkpoint("llama", dtype, sharded=sharded), tmp_path / "copy"
    created = biases(vector)
    written = copy(base, stage, created=created, config_changes=FLAG)
    assert written.originals == {}

    old = sorted(item.name for item in base.glob("*.safetensors"))
    total = len(old) + 1
    names = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    assert sorted(item.name for item in stage.glob("*.safetensors")) == names
    for was, now in zip(old, names, strict=False):
        assert (stage / now).read_bytes() == (base / was).read_bytes()
    with safe_open(stage / names[-1], "pt") as shard:
        assert shard.metadata() == {"format": "pt"}
        assert set(shard.keys()) == set(created)
    assert_index_is_true(stage)
    assert_same_but(stored(base), stored(stage), set(created))

    model = load(stage)
    assert model.config.mlp_bias is True
    plain = load(base)
    with hooked(plain, 1, vector):
        expected = logits(plain)
    assert (logits(model) - expected).abs().max() <= 2e-5
    assert (logits(model) - logits(load(base))).abs().max() > 0.01


def test_odd_shard_names_are_kept(checkpoint: Checkpoint, tmp_path: Path, vector: torch.Tensor) -> None:
    base = Path(shutil.copytree(checkpoint("llama", sharded=True), tmp_path / "base"))
    index = json.loads((base / INDEX).read_text())
    new = {name: f"pytorch_{name}" for name in set(index["weight_map"].values())}
    for was, now in new.items():
        (base / was).rename(base / now)
    index["weight_map"] = {key: new[name] for key, name in index["weight_map"].items()}
    (base / INDEX).write_text(json.dumps(index))
    created = biases(vector)
    copy(base, tmp_path / "copy", created=created, config_changes=FLAG)
    names = {item.name for item in (tmp_path / "copy").glob("*.safetensors")}
    assert names == {*new.values(), "model-steering.safetensors"}
    assert_index_is_true_for_any(tmp_path / "copy")
    load(tmp_path / "copy")

    # A copy of a copy: the shard of the first must not be overwritten by the second.
    copy(tmp_path / "copy", tmp_path / "again", created={"extra": torch.ones(2)})
    names = {item.name for item in (tmp_path / "again").glob("*.safetensors")}
    assert names == {*new.values(), "model-steering.safetensors", "model-steering-2.safetensors"}
    again = CheckpointFolder(tmp_path / "again").tensors
    assert torch.equal(read_tensor(again[BIAS.format(1, "down")]), vector)


def assert_index_is_true_for_any(folder: Path) -> None:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    for name, info in CheckpointFolder(folder).tensors.items():
        assert weight_map.pop(name) == info.file.name
    assert not weight_map


def test_a_copy_of_a_numbered_copy(checkpoint: Checkpoint, tmp_path: Path, vector: torch.Tensor) -> None:
    copy(checkpoint("llama"), tmp_path / "first", created=biases(vector), config_changes=FLAG)
    copy(tmp_path / "first", tmp_path / "second", created={"extra": torch.ones(2)})
    assert sorted(item.name for item in (tmp_path / "second").glob("*.safetensors")) == [
        f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)
    ]
    assert_index_is_true(tmp_path / "second")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_replaced_tensors_are_patched_in_place(
    checkpoint: Checkpoint, tmp_path: Path, vector: torch.Tensor, kind: str, sharded: bool, dtype: str
) -> None:
    config = FLAG if kind == "llama" else {}
    base, stage = checkpoint(kind, dtype, sharded=sharded, **config), tmp_path / "copy"
    name = BIAS.format(1, "down") if kind == "llama" else "transformer.h.1.mlp.c_proj.bias"
    tensors = CheckpointFolder(base).tensors
    before = read_tensor(tensors[name])
    after = (before.float() + vector).to(before.dtype)
    written = copy(base, stage, replaced={name: after})
    assert set(written.originals) == {name}
    assert same_bits(written.originals[name], before)

    # The same files under the same names; load + modify + save gives the same tensors.
    weights = sorted(item.name for item in base.glob("*.safetensors"))
    assert sorted(item.name for item in stage.glob("*.safetensors")) == weights
    assert sharded is (weights != [SINGLE])
    assert all((stage / item).stat().st_size == (base / item).stat().st_size for item in weights)
    assert_same_but(stored(base), stored(stage), {name})
    assert_index_is_true(stage)
    modified = load(base, "auto")
    with torch.no_grad():
        modified.get_parameter(name).copy_(after)
    with_stock = stored(save(modified, tmp_path / "stock", modified.dtype, sharded=sharded))
    assert_same_but(with_stock, stored(stage), set())

    plain = load(base)
    with hooked(plain, 1, after.float() - before.float()):
        expected = logits(plain)
    assert (logits(load(stage)) - expected).abs().max() <= 2e-5


def test_created_and_replaced_together(checkpoint: Checkpoint, tmp_path: Path, vector: torch.Tensor) -> None:
    base = checkpoint("llama")
    norm = read_tensor(CheckpointFolder(base).tensors["model.norm.weight"])
    created = biases(vector)
    copy(base, tmp_path / "copy", created=created, replaced={"model.norm.weight": norm * 2}, config_changes=FLAG)
    assert_same_but(stored(base), stored(tmp_path / "copy"), {*created, "model.norm.weight"})
    assert torch.equal(load(tmp_path / "copy").model.norm.weight, norm * 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_half_precision_bias_may_be_kept_in_fp32(
    checkpoint: Checkpoint, tmp_path: Path, vector: torch.Tensor, sharded: bool, dtype: str
) -> None:
    """It leaves its shard for the new one: a key in two shards means different things to different loaders."""
    base, stage = checkpoint("gpt2", dtype, sharded=sharded), tmp_path / "copy"
    name, other = "transformer.h.1.mlp.c_proj.bias", "transformer.h.0.mlp.c_proj.bias"
    tensors = CheckpointFolder(base).tensors
    wide, narrow = read_tensor(tensors[name]).float() + vector, read_tensor(tensors[other]) * 2
    written = copy(base, stage, replaced={name: wide, other: narrow})
    assert set(written.originals) == {name, other}
    assert all(same_bits(value, read_tensor(tensors[key])) for key, value in written.originals.items())

    old, new = stored(base), stored(stage)
    assert_same_but(old, new, {name, other})
    assert same_bits(new[name], wide)
    assert same_bits(new[other], narrow)
    total = len(CheckpointFolder(base).weight_files) + 1
    last = f"model-{total:05d}-of-{total:05d}.safetensors"
    assert set(load_file(stage / last)) == {name}
    assert len(list(stage.glob("*.safetensors"))) == total
    index = assert_index_is_true(stage)
    assert index["weight_map"][name] == last
    assert read_tensor(CheckpointFolder(stage).tensors[name]).dtype == torch.float32

    plain = load(base)
    with torch.no_grad():
        plain.get_parameter(name).copy_(wide)
        plain.get_parameter(other).copy_(narrow)
    assert torch.equal(logits(load(stage)), logits(plain))


def test_a_shard_that_loses_its_only_tensor(checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(checkpoint("llama", "bfloat16"), base)
    tensors = stored(base)
    norm = tensors.pop("model.norm.weight")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file(tensors, base / names[0], {"format": "pt"})
    save_file({"model.norm.weight": norm}, base / names[1], {"format": "pt"})
    (base / SINGLE).unlink()
    weight_map = {**dict.fromkeys(tensors, names[0]), "model.norm.weight": names[1]}
    (base / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    copy(base, tmp_path / "copy", replaced={"model.norm.weight": norm.float() * 2})
    assert torch.equal(stored(tmp_path / "copy")["model.norm.weight"], norm.float() * 2)
    assert_same_but(stored(base), stored(tmp_path / "copy"), {"model.norm.weight"})
    assert torch.equal(load(tmp_path / "copy").model.norm.weight, norm.float() * 2)


@pytest.mark.parametrize("wrong", ["dtype", "shape", "name"])
def test_a_mistake_of_ours_is_loud(checkpoint: Checkpoint, tmp_path: Path, wrong: str) -> None:
    base = CheckpointFolder(checkpoint("llama"))
    (tmp_path / "copy").mkdir()
    tensor = {"dtype": torch.ones(HIDDEN).half(), "shape": torch.ones(HIDDEN - 1)}.get(wrong, torch.ones(HIDDEN))
    replaced, created = ({}, {"model.norm.weight": tensor}) if wrong == "name" else ({"model.norm.weight": tensor}, {})
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        write_copy(base, tmp_path / "copy", created=created, replaced=replaced, config_changes={})


def test_a_single_file_gets_an_index_that_names_nothing_else(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """vLLM and SGLang load every *.safetensors of a folder without an index, so our vectors too, and stop."""
    copy(checkpoint("gpt2"), tmp_path / "copy")
    save_file({"love.layer.1": torch.ones(HIDDEN)}, tmp_path / "copy" / "steering.safetensors")
    weight_map = json.loads((tmp_path / "copy" / INDEX).read_text())["weight_map"]
    assert set(weight_map.values()) == {SINGLE}
    assert torch.equal(logits(load(tmp_path / "copy")), logits(load(checkpoint("gpt2"))))


def test_no_stale_index_stays_beside_a_single_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = Path(shutil.copytree(checkpoint("llama"), tmp_path / "base"))
    (base / INDEX).write_text(json.dumps({"metadata": {"x": 1}, "weight_map": {"lost": "model-gone.safetensors"}}))
    copy(base, tmp_path / "copy")
    assert assert_index_is_true(tmp_path / "copy")["metadata"].keys() == {"total_size"}
    load(tmp_path / "copy")


@pytest.mark.parametrize("metadata", [None, "text", [1], {"total_size": 3, "total_parameters": 7, "mine": "kept"}])
def test_the_index_metadata(checkpoint: Checkpoint, tmp_path: Path, metadata: object) -> None:
    base = Path(shutil.copytree(checkpoint("llama", sharded=True), tmp_path / "base"))
    index = json.loads((base / INDEX).read_text())
    (base / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": index["weight_map"]}))
    copy(base, tmp_path / "copy", created={"extra": torch.ones(5)})
    new = assert_index_is_true(tmp_path / "copy")["metadata"]
    if isinstance(metadata, dict):
        assert (new["total_parameters"], new["mine"]) == (12, "kept")


def test_the_config_keeps_all_that_is_not_changed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = Path(shutil.copytree(checkpoint("llama"), tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "modeling.X"}, "gone": 1, "odd": [1e-05, "日本", "\ud800", None]}
    (base / "config.json").write_text(json.dumps(config))
    (base / "modeling.py").write_text("")
    changes = {"mlp_bias": True, "gone": None, "absent": None, "architectures": ["LlamaForCausalLM"]}
    for remote_code in (False, True):
        stage = tmp_path / f"copy-{remote_code}"
        copy(base, stage, config_changes=changes, remote_code=remote_code)
        expected = {**config, "mlp_bias": True, "architectures": ["LlamaForCausalLM"]}
        del expected["gone"]
        if not remote_code:
            del expected["auto_map"]
        new = json.loads((stage / "config.json").read_text())
        assert new == expected
        assert list(new) == list(expected), "the order of the keys changed"
        assert (stage / "modeling.py").exists() is remote_code


def test_a_private_umask_does_not_lock_the_copy(checkpoint: Checkpoint, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        copy(checkpoint("llama"), tmp_path / "copy", created={"extra": torch.ones(1)})
    finally:
        os.umask(before)


def test_the_same_input_gives_the_same_bytes(checkpoint: Checkpoint, tmp_path: Path, vector: torch.Tensor) -> None:
    for name in ("one", "two"):
        copy(checkpoint("llama", sharded=True), tmp_path / name, created=biases(vector), config_changes=FLAG)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
