"""Folders with links in them: no secret gets into a copy, and the Hub's cache keeps working."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fuzz import seeds

from patcher.checkpoint.bin_files import convert_bin
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.writer import write_copy
from patcher.errors import InputError
from patcher.patched.history import carry_history, give_back_history
from patcher.patched.reading import read_manifest
from patcher.patched.schema import Patch
from patcher.publish.contents import published_files

SECRET = "-----BEGIN PRIVATE KEY-----"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "home" / ".ssh" / "id_rsa"
    path.parent.mkdir(parents=True)
    path.write_text(SECRET)
    return path


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, content in seeds.checkpoints()[0].items():
        (folder / name).write_bytes(content)
    return folder


def copied(folder: Path, stage: Path) -> Path:
    stage.mkdir()
    write_copy(CheckpointFolder(folder), stage, created={}, replaced={}, config_changes={})
    return stage


def assert_refused(read: Callable[[], Any], link: Path) -> None:
    with pytest.raises(InputError, match="leads out of the folder") as caught:
        read()
    assert str(link) in str(caught.value)
    assert SECRET not in str(caught.value)


LINKS = {
    "LICENSE": "{secret}",
    "tokenizer.json": "../home/.ssh/id_rsa",
    "additional_chat_templates/x.jinja": "{secret}",
    "tokenizer.model": "one",
}


@pytest.mark.parametrize("name", LINKS)
def test_a_side_file_that_is_a_link_to_elsewhere_is_not_copied(name: str, secret: Path, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "base")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(LINKS[name].format(secret=secret))
    (folder / "one").symlink_to(secret)
    assert_refused(lambda: copied(folder, tmp_path / "stage"), folder / name)


def test_a_folder_of_templates_that_is_a_link_is_not_copied(secret: Path, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "base")
    secret.rename(secret.with_suffix(".jinja"))
    (folder / "additional_chat_templates").symlink_to(secret.parent)
    assert_refused(lambda: copied(folder, tmp_path / "stage"), folder / "additional_chat_templates" / "id_rsa.jinja")


def test_pickled_weights_are_converted_without_the_links_beside_them(secret: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    for name, content in seeds.bin_checkpoints()[0].items():
        (folder / name).write_bytes(content)
    (folder / "modeling.py").symlink_to(secret)
    assert_refused(lambda: convert_bin(CheckpointFolder(folder), tmp_path / "out"), folder / "modeling.py")


def test_links_inside_of_a_folder_and_to_a_folder_are_followed(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "base")
    (folder / "LICENSE").rename(folder / "text")
    (folder / "LICENSE").symlink_to("text")
    (tmp_path / "link").symlink_to(folder)
    stage = copied(tmp_path / "link", tmp_path / "stage")
    assert (stage / "LICENSE").read_text() == "free"
    assert not any(item.is_symlink() for item in stage.iterdir())


def test_weights_may_lie_elsewhere_but_nothing_passes_for_them(secret: Path, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "base")
    shard = folder / "model-00001-of-00002.safetensors"
    shard.rename(tmp_path / "large disk")
    shard.symlink_to(tmp_path / "large disk")
    assert (copied(folder, tmp_path / "stage") / shard.name).read_bytes() == (tmp_path / "large disk").read_bytes()
    shard.unlink()
    shard.symlink_to(secret)
    with pytest.raises(InputError, match="not a safetensors file"):
        copied(folder, tmp_path / "again")


@pytest.mark.parametrize("depth", ["snapshots/main", "snapshots/main/sub"])
def test_the_cache_of_the_hub_is_followed(depth: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "files")
    cache = tmp_path / "models--me--model"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / depth
    snapshot.mkdir(parents=True)
    for number, item in enumerate(sorted(folder.iterdir())):
        blob = cache / "blobs" / f"{number:040x}"
        shutil.copy(item, blob)
        (snapshot / item.name).symlink_to(blob)
    stage = copied(snapshot, tmp_path / "stage")
    assert (stage / "LICENSE").read_text() == "free"
    assert (stage / "tokenizer.model").read_bytes() == b"\0\1\2"


def test_a_folder_that_looks_like_a_cache_is_not_trusted(secret: Path, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "models--evil" / "snapshots" / "main")
    (tmp_path / "models--evil" / "blobs").symlink_to(secret.parent)
    (folder / "LICENSE").unlink()
    (folder / "LICENSE").symlink_to("../../blobs/id_rsa")
    assert_refused(lambda: copied(folder, tmp_path / "stage"), folder / "LICENSE")


SHARDS = (
    "../x.safetensors",
    "/etc/x.safetensors",
    "a/../x.safetensors",
    "..",
    "",
    "./x.safetensors",
    "a\0.safetensors",
)


@pytest.mark.parametrize("name", SHARDS)
def test_an_index_names_no_file_of_another_folder(name: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "base")
    (tmp_path / "x.safetensors").write_bytes(seeds.safetensors_file())
    (folder / "x.safetensors").write_bytes(seeds.safetensors_file())
    index = {"weight_map": {"a.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"outside of the folder|missing"):
        assert CheckpointFolder(folder).tensors


def patched(folder: Path) -> Path:
    folder.mkdir()
    for name, content in seeds.patched_folders()[0].items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", ["notes.txt", "LICENSE", "more.safetensors", "README.md"])
def test_a_link_to_elsewhere_is_not_published(name: str, secret: Path, tmp_path: Path) -> None:
    folder = patched(tmp_path / "steered")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    assert_refused(lambda: published_files(folder, read_manifest(folder)), folder / name)


def test_files_that_are_never_published_may_be_links(secret: Path, tmp_path: Path) -> None:
    folder = patched(tmp_path / "steered")
    (folder / ".key").symlink_to(secret)
    (folder / "key.pem").symlink_to(secret)
    names = {file.name for file in published_files(folder, read_manifest(folder))}
    assert "steering.json" in names and not names & {".key", "key.pem"}


def test_the_history_of_a_folder_carries_no_link_along(secret: Path, tmp_path: Path) -> None:
    folder = patched(tmp_path / "steered")
    generations = folder / "steering_generations.jsonl"
    generations.symlink_to(secret)
    (tmp_path / "stage").mkdir()
    assert_refused(lambda: carry_history(folder, tmp_path / "stage", 1), generations)
    earlier = folder / "steering_generations.1.jsonl"
    generations.rename(earlier)
    (tmp_path / "earlier").mkdir()
    assert_refused(lambda: give_back_history(folder, tmp_path / "earlier", [Patch()]), earlier)
