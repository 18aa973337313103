"""The base back: byte for byte from the patched folder alone, or a clear word on why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import hashes, stored
from support.patched_folders import back, odd_header, patched, width
from support.tiny_models import tiny_checkpoint

from patcher.checkpoint.folder import INDEX, SINGLE, CheckpointFolder
from patcher.checkpoint.safetensors_file import read_header
from patcher.checkpoint.steering_files import MANIFEST, VECTORS
from patcher.checkpoint.undo import restore
from patcher.publish.privacy import sanitised_manifest

LLAMA, GPT2, QWEN2, QWEN3 = (
    "meta-llama--Llama-3.2-1B", "openai-community--gpt2", "Qwen--Qwen2.5-0.5B", "Qwen--Qwen3-8B"
)  # fmt: skip


ROUTES: dict[str, tuple[str, dict[str, Any], str]] = {
    "flag": (LLAMA, {}, "flag"),
    "native": (GPT2, {}, "native"),
    "relabel, of config alone": (QWEN2, {}, "relabel"),
    "relabel, Qwen3": (QWEN3, {"prefer": "free"}, "relabel"),
    "carrier": (QWEN3, {}, "carrier"),
    "embedding, positions": (GPT2, {"layer": -1}, "embedding"),
    "embedding, untied": (QWEN2, {"layer": -1}, "embedding"),
}


@pytest.mark.parametrize(
    ("sharded", "dtype"), [(False, torch.float32), (True, torch.bfloat16)], ids=["single", "shards"]
)
@pytest.mark.parametrize("name", ROUTES)
def test_every_byte_comes_back(tmp_path: Path, name: str, sharded: bool, dtype: torch.dtype) -> None:
    model, options, route = ROUTES[name]
    base, out = tmp_path / "base", tmp_path / "out"
    layer = tiny_checkpoint(base, model, sharded=sharded, dtype=dtype)
    options = dict(options)
    manifest = patched(base, out, options.pop("layer", layer), **options)
    assert manifest["route"]["name"] == route
    assert hashes(base) != {name: digest for name, digest in hashes(out).items() if name in hashes(base)}
    result = back(out, tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(base)
    assert sorted(result.identical) == sorted(hashes(base))
    assert not (result.different or result.missing or result.unchecked or result.notes or result.left)
    assert result.removed == [{"name": "love", "layer": manifest["edits"][0]["layer"]}]


def test_a_fitted_edit_is_taken_out_as_well(tmp_path: Path) -> None:
    """Weights that were added to and rounded: the originals are kept, not computed back."""
    from patcher.checkpoint.writer import write_copy

    base, stage, again = tmp_path / "base", tmp_path / "out", tmp_path / "again"
    tiny_checkpoint(base, LLAMA, dtype=torch.bfloat16, sharded=True)
    checkpoint = CheckpointFolder(base)
    name = "model.layers.1.mlp.down_proj.weight"
    before = stored(base)[name]
    stage.mkdir()
    replaced = {name: (before.float() + torch.randn(before.shape)).bfloat16()}
    written = write_copy(checkpoint, stage, created={}, replaced=replaced, config_changes={})
    save_file({"original/" + key: value.float() for key, value in written.originals.items()}, stage / VECTORS)
    again.mkdir()
    originals = read_header(stage / VECTORS)
    restore(
        CheckpointFolder(stage),
        again,
        undo=json.loads(json.dumps(written.undo)),
        renamed={},
        originals={key.removeprefix("original/"): info for key, info in originals.items()},
    )
    assert hashes(again) == hashes(base)


def test_links(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    layer = tiny_checkpoint(base, GPT2, sharded=True)
    patched(base, out, layer, link=True)
    before = hashes(base)
    result = back(out, tmp_path / "back", link=True)
    assert hashes(tmp_path / "back") == before == hashes(base)
    inodes = {file.stat().st_ino for file in out.glob("model*.safetensors")}
    shared = [file for file in (tmp_path / "back").glob("*.safetensors") if file.stat().st_ino in inodes]
    # The shard with the bias is not.
    assert len(shared) == len(CheckpointFolder(base).weight_files) - 1
    assert result.bytes_written < sum(file.stat().st_size for file in base.iterdir())


def odd_config(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config = {"zz": 1e-05, **config, "auto_map": {"AutoModelForCausalLM": "modeling.X"}}
    (base / "config.json").write_bytes(json.dumps(config).replace(", ", ",\r\n").encode())


def odd_index(base: Path) -> None:
    index = json.loads((base / INDEX).read_text())
    (base / INDEX).write_text(json.dumps({"weight_map": index["weight_map"], "metadata": {"a": None}}))


def stale_index(base: Path) -> None:
    (base / INDEX).write_text(json.dumps({"weight_map": {"lost": "gone.safetensors"}}))


@pytest.mark.parametrize("model", [LLAMA, GPT2, QWEN3])
@pytest.mark.parametrize("odd", [odd_header, odd_config, odd_index, stale_index], ids=lambda odd: odd.__name__)
def test_files_of_other_tools_come_back_too(tmp_path: Path, odd: Callable[[Path], None], model: str) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    layer = tiny_checkpoint(base, model, sharded=odd is odd_index, dtype=torch.bfloat16)
    odd(base)
    # Before block 0 the position table of GPT-2 leaves its file for another one.
    patched(base, out, -1 if model == GPT2 else layer)
    result = back(out, tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(base)
    assert bool(result.notes) is (odd is odd_config)


def test_zeros_that_were_replaced(tmp_path: Path) -> None:
    """Some GPTQ checkpoints store biases of zero that the class does not have."""
    base, out = tmp_path / "base", tmp_path / "out"
    layer = tiny_checkpoint(base, LLAMA)
    tensors = load_file(base / SINGLE)
    for block in range(layer + 1):
        tensors[f"model.layers.{block}.mlp.down_proj.bias"] = torch.zeros(width(base))
    save_file(tensors, base / SINGLE, {"format": "pt"})
    manifest = patched(base, out, layer)
    assert len(manifest["route"]["dropped"]) == layer + 1
    back(out, tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(base)


def test_a_shard_that_is_gone_comes_back(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    tiny_checkpoint(base, GPT2, dtype=torch.bfloat16)
    tensors = load_file(base / SINGLE)
    table = {name: tensors.pop(name) for name in list(tensors) if name.endswith("wpe.weight")}
    files = {"model-00001-of-00002.safetensors": table, "model-00002-of-00002.safetensors": tensors}
    for file, content in files.items():
        save_file(content, base / file, {"format": "pt"})
    (base / SINGLE).unlink()
    weight_map = {name: file for file, content in files.items() for name in content}
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    patched(base, out, -1)
    back(out, tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(base)


def test_a_published_folder_gives_its_base_back_too(tmp_path: Path) -> None:
    """What is published is rid of local paths; what is needed here is still there."""
    base, out = tmp_path / "base", tmp_path / "out"
    layer = tiny_checkpoint(base, GPT2, sharded=True)
    odd_index(base)
    manifest = patched(base, out, layer)
    public = sanitised_manifest(manifest)
    assert str(tmp_path) not in json.dumps(public)
    (out / MANIFEST).write_text(json.dumps(public))
    back(out, tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(base)
