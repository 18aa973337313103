"""Which files of a checkpoint folder count, and which of them travel."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import load, logits, same_bits, stored

from patcher.checkpoint.folder import BIN_INDEX, BIN_SINGLE, INDEX, SINGLE, CheckpointFolder
from patcher.checkpoint.safetensors_file import read_tensor
from patcher.checkpoint.writer import write_copy
from patcher.errors import InputError

Checkpoint = Callable[..., Path]


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A folder with a config and nothing else."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def shard(folder: Path, name: str, **tensors: float) -> None:
    save_file({key: torch.tensor([value]) for key, value in tensors.items()}, folder / name)


def index(folder: Path, weight_map: Any, name: str = INDEX) -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def values(folder: Path) -> dict[str, float]:
    return {name: float(read_tensor(info)) for name, info in CheckpointFolder(folder).tensors.items()}


@pytest.mark.parametrize("sharded", [False, True])
def test_the_two_safetensors_layouts(checkpoint: Checkpoint, sharded: bool) -> None:
    folder = CheckpointFolder(checkpoint("llama", sharded=sharded))
    assert folder.layout == ("sharded" if sharded else "single")
    assert not folder.is_bin
    assert folder.config["model_type"] == "llama"
    expected = stored(folder.path)
    assert set(folder.tensors) == set(expected)
    assert all(same_bits(read_tensor(folder.tensors[name]), tensor) for name, tensor in expected.items())
    names = folder.weight_files
    assert names == sorted(names)
    assert names == [SINGLE] if not sharded else len(names) > 2


def test_the_two_bin_layouts(empty: Path) -> None:
    (empty / BIN_SINGLE).write_bytes(b"")
    assert CheckpointFolder(empty).layout == "bin"
    assert CheckpointFolder(empty).weight_files == [BIN_SINGLE]
    (empty / BIN_SINGLE).unlink()
    index(empty, {"a": "pytorch_model-00002-of-00002.bin", "b": "pytorch_model-00001-of-00002.bin"}, BIN_INDEX)
    folder = CheckpointFolder(empty)
    assert (folder.layout, folder.is_bin) == ("bin-sharded", True)
    assert folder.weight_files == ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]


def test_safetensors_win_over_bin(empty: Path) -> None:
    (empty / BIN_SINGLE).write_bytes(b"")
    shard(empty, SINGLE, a=1)
    assert CheckpointFolder(empty).layout == "single"


def test_a_single_file_wins_over_an_index_as_in_transformers(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("llama"), tmp_path / "both"))
    halved = {name: tensor / 2 for name, tensor in stored(folder).items()}
    save_file(halved, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    index(folder, dict.fromkeys(halved, "model-00001-of-00001.safetensors"))
    assert CheckpointFolder(folder).layout == "single"
    assert CheckpointFolder(folder).weight_files == [SINGLE]
    assert torch.equal(logits(load(folder)), logits(load(checkpoint("llama"))))


def test_one_key_in_two_shards_is_refused(empty: Path) -> None:
    shard(empty, "model-00001-of-00002.safetensors", a=1, b=2)
    shard(empty, "model-00002-of-00002.safetensors", b=3)
    index(empty, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    with pytest.raises(InputError, match="'b' is stored twice") as caught:
        _ = CheckpointFolder(empty).tensors
    assert "model-00001-of-00002.safetensors and model-00002-of-00002.safetensors" in str(caught.value)


def test_a_shard_that_the_index_does_not_name_is_not_read(empty: Path) -> None:
    shard(empty, "model-00001-of-00001.safetensors", a=1)
    shard(empty, "model-old.safetensors", a=2)
    index(empty, {"a": "model-00001-of-00001.safetensors"})
    assert values(empty) == {"a": 1}


@pytest.mark.parametrize(
    "name",
    ["../model-1.safetensors", "/etc/model.safetensors", "sub/model-1.safetensors", "..", ".", "", None, 5, ["x"], {}],
)
def test_a_shard_outside_of_the_folder_is_refused(empty: Path, name: object) -> None:
    shard(empty.parent, "model-1.safetensors", a=1)
    index(empty, {"a": name})
    with pytest.raises(InputError, match="outside of the folder"):
        _ = CheckpointFolder(empty).weight_files


@pytest.mark.parametrize("name", ["config.json", "model.bin", "steering.json"])
def test_a_shard_that_is_no_safetensors_file_is_refused(empty: Path, name: str) -> None:
    index(empty, {"a": name})
    with pytest.raises(InputError, match="not safetensors"):
        _ = CheckpointFolder(empty).weight_files


@pytest.mark.parametrize("content", ['{"metadata": {}}', *(f'{{"weight_map": {x}}}' for x in ("{}", "[]", 1, "null"))])
@pytest.mark.parametrize("name", [INDEX, BIN_INDEX])
def test_an_index_without_a_weight_map_is_refused(empty: Path, content: str, name: str) -> None:
    (empty / name).write_text(content)
    with pytest.raises(InputError, match="weight_map"):
        _ = CheckpointFolder(empty).weight_files


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff\xfe", b"", b"[" * 100_000])
@pytest.mark.parametrize("name", [INDEX, "config.json"])
def test_broken_json_is_refused(empty: Path, content: bytes, name: str) -> None:
    (empty / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        _ = CheckpointFolder(empty).weight_files


def test_a_missing_shard_is_named(empty: Path) -> None:
    shard(empty, "model-00001-of-00002.safetensors", a=1)
    index(empty, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors: a weight file is missing"):
        _ = CheckpointFolder(empty).tensors


def test_a_partial_download_holds_what_is_there(empty: Path) -> None:
    one, two, three = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
    shard(empty, two, a=1, b=2)
    index(empty, {"a": two, "b": two, "c": one, "d": three})
    folder = CheckpointFolder(empty, partial=True)
    assert folder.weight_files == [two] and set(folder.tensors) == {"a", "b"}
    assert dict(folder.weight_map) == {"a": two, "b": two, "c": one, "d": three}
    with pytest.raises(InputError, match="a weight file is missing"):
        _ = CheckpointFolder(empty).tensors
    shard(empty, one, b=3)
    with pytest.raises(InputError, match="'b' is stored twice"):
        _ = CheckpointFolder(empty, partial=True).tensors
    (empty / one).write_bytes(b"cut")
    with pytest.raises(InputError, match="truncated"):
        _ = CheckpointFolder(empty, partial=True).tensors
    for name in (one, two):
        (empty / name).unlink()
    with pytest.raises(InputError, match="none of the weight files"):
        _ = CheckpointFolder(empty, partial=True).tensors


@pytest.mark.parametrize("sharded", [False, True])
def test_partial_changes_nothing_where_all_is_there(checkpoint: Checkpoint, sharded: bool) -> None:
    path = checkpoint("llama", sharded=sharded)
    whole, partial = CheckpointFolder(path), CheckpointFolder(path, partial=True)
    assert partial.weight_files == whole.weight_files and partial.tensors == whole.tensors


def test_no_weights_no_config_no_folder(empty: Path) -> None:
    (empty / "model.onnx").write_bytes(b"")
    with pytest.raises(InputError, match="no weights") as caught:
        CheckpointFolder(empty)
    assert "model.onnx" in str(caught.value)
    (empty / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json is missing"):
        CheckpointFolder(empty)
    with pytest.raises(InputError, match="no such folder"):
        CheckpointFolder(empty / "nothing")


TRAVELS = [
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "qwen.tiktoken", "tekken.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/rag.jinja",
    "additional_chat_templates/tool_use.jinja", "LICENSE", "LICENSE.txt", "LICENCE.md", "NOTICE", "USE_POLICY.md",
]  # fmt: skip
STAYS = [
    "README.md", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
    "consolidated.00.pth", "consolidated.safetensors", "params.json", "pytorch_model.bin", "tf_model.h5",
    "flax_model.msgpack", "model.onnx", "onnx/model.onnx", "openvino_model.xml", "model.ggml", "model-q4.gguf",
    ".gitattributes", ".git/config", "original/consolidated.00.pth", "additional_chat_templates/notes.txt",
    "additional_chat_templates/deep/x.jinja", "events.out.tfevents", "steering.json", "steering.safetensors",
    "adapter_model.safetensors", "chat_template.jinja.bak", "extra.safetensors",
]  # fmt: skip
CODE = ["modeling_custom.py", "configuration_custom.py"]


def test_only_the_allow_list_travels(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("llama"), tmp_path / "full"))
    for name in (*TRAVELS, *STAYS, *CODE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "vocab.json").unlink()
    (folder / "vocab.json").mkdir()
    (folder / "additional_chat_templates" / "folder.jinja").mkdir()
    expected = sorted(set(TRAVELS) - {"vocab.json"})
    base = CheckpointFolder(folder)
    assert sorted(map(str, base.side_files())) == expected
    assert sorted(map(str, base.side_files(remote_code=True))) == sorted([*expected, *CODE])
    for remote_code in (False, True):
        stage = tmp_path / f"copy-{remote_code}"
        stage.mkdir()
        write_copy(base, stage, created={}, replaced={}, config_changes={}, remote_code=remote_code)
        copied = {str(item.relative_to(stage)) for item in stage.rglob("*") if item.is_file()}
        extra = CODE if remote_code else []
        assert copied == {*expected, *extra, "config.json", SINGLE, INDEX}
        assert (stage / "tokenizer.json").read_text() == "tokenizer.json"


@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_of_symlinks_is_followed(checkpoint: Checkpoint, tmp_path: Path, sharded: bool) -> None:
    """The Hub cache: snapshots/<commit>/<name> -> ../../blobs/<hash>."""
    source = checkpoint("llama", sharded=sharded)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / ("0" * 40)
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (tmp_path / "licence").write_text("free")
    for number, item in enumerate([*source.iterdir(), tmp_path / "licence"]):
        shutil.copy(item, blobs / f"{number:064x}")
        name = "LICENSE" if item.name == "licence" else item.name
        (snapshot / name).symlink_to(Path("../../blobs") / f"{number:064x}")
    (snapshot / "tokenizer.model").symlink_to(tmp_path / "not downloaded")
    base = CheckpointFolder(snapshot)
    stage = tmp_path / "copy"
    stage.mkdir()
    write_copy(base, stage, created={}, replaced={}, config_changes={})
    assert not any(item.is_symlink() for item in stage.rglob("*"))
    assert (stage / "LICENSE").read_text() == "free"
    assert torch.equal(logits(load(stage)), logits(load(source)))
