"""Hashes of the base: right, computed once, and of what was copied."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import names

from patcher.checkpoint import hashes
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.hashes import base_files, differing, hashing
from patcher.checkpoint.writer import write_copy
from patcher.disk.cache_folder import cache_folder
from patcher.errors import InputError, OutsideError
from patcher.patched.base import require_recorded
from patcher.patched.schema import Patch

LARGE = 2 << 20


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATCH_MODEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Two files of weights that are worth remembering, and small ones, all of them old."""
    folder = tmp_path / "base"
    (folder / "additional_chat_templates").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "LICENSE").write_text("yours")
    (folder / "unrelated.bin").write_text("no")
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    weight_map = {}
    for number in (1, 2):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({f"w{number}": torch.randn(LARGE // 4)}, folder / file)
        weight_map[f"w{number}"] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    time.sleep(0.06)
    return folder


def expected(folder: Path) -> dict[str, str]:
    chosen = [str(name) for name in base_files(CheckpointFolder(folder))]
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in chosen}


def file_records(folder: Path, **options: Any) -> list[dict[str, Any]]:
    with hashing(CheckpointFolder(folder), **options) as running:
        return running.records()


def found(folder: Path, **options: Any) -> dict[str, str]:
    records = file_records(folder, **options)
    assert all((folder / record["name"]).stat().st_size == record["size"] for record in records)
    assert [record["name"] for record in records] == sorted(record["name"] for record in records)
    return {record["name"]: record["sha256"] for record in records}


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are really read."""
    read: list[str] = []
    honest = hashes._sha256
    monkeypatch.setattr(hashes, "_sha256", lambda path, stop: (read.append(path.name), honest(path, stop))[1])
    return read


def test_every_file_that_the_result_depends_on(base: Path) -> None:
    records = found(base)
    assert records == expected(base)
    assert records.keys() == {
        "LICENSE", "additional_chat_templates/tool.jinja", "config.json", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors", "model.safetensors.index.json",
    }  # fmt: skip


def test_large_files_are_hashed_once(base: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = counting(monkeypatch)
    first = found(base)
    assert len(read) == 6
    read.clear()
    assert found(base) == first
    assert not [name for name in read if name.endswith(".safetensors")]
    assert len(list((cache / "sha256").iterdir())) == 2


@pytest.mark.parametrize("change", ["content", "same size and time", "replaced", "moved"])
def test_a_changed_file_is_hashed_again(base: Path, change: str) -> None:
    found(base)
    file = base / "model-00001-of-00002.safetensors"
    before = file.stat()
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    if change == "content":
        file.write_bytes(raw)
    elif change == "same size and time":
        file.write_bytes(raw)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "replaced":
        (base / "new").write_bytes(raw)
        os.utime(base / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
        (base / "new").replace(file)
    else:
        base = base.rename(base.with_name("elsewhere"))
    assert found(base) == expected(base)


@pytest.mark.parametrize("damage", ["not json", "null", "another hash", "no access"])
def test_a_damaged_cache_is_no_cache(base: Path, cache: Path, damage: str) -> None:
    found(base)
    for entry in (cache / "sha256").iterdir():
        value = json.loads(entry.read_text())
        text = {"not json": "{", "null": "null", "another hash": json.dumps({**value, "sha256": "../x"})}.get(damage)
        if text is not None:
            entry.write_text(text)
    if damage == "no access":
        shutil.rmtree(cache)
        cache.write_text("a file, not a folder")
    assert found(base) == expected(base)


def test_a_file_that_is_too_new_is_not_remembered(base: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could still change within the tick of the clock that dates it."""
    future = time.time_ns() + 10**10
    for file in base.glob("*.safetensors"):
        os.utime(file, ns=(future, future))
    found(base)
    assert not (cache / "sha256").exists()


def test_hub_cache_names_are_hashes(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("c" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in (item.name for item in base.iterdir() if item.is_file()):
        digest = hashlib.sha256((base / name).read_bytes()).hexdigest()
        # As the Hub does: large files by their SHA-256, small ones by git's SHA-1.
        blob = digest if name.endswith(".safetensors") else hashlib.sha1(name.encode()).hexdigest()
        shutil.copy(base / name, blobs / blob)
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / blob)
    read = counting(monkeypatch)
    # As long as this is not the cache of the user's own client, its names say nothing.
    assert found(snapshot) == expected(snapshot)
    assert len(read) == 5
    read.clear()
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert found(snapshot) == expected(snapshot)
    assert sorted(read) == ["LICENSE", "config.json", "model.safetensors.index.json"]
    # A link of the user's own to a file of such a name says nothing.
    other = tmp_path / "own" / ("a" * 64)
    other.parent.mkdir()
    shutil.copy(base / "model-00001-of-00002.safetensors", other)
    (base / "model-00001-of-00002.safetensors").unlink()
    (base / "model-00001-of-00002.safetensors").symlink_to(other)
    assert found(base) == expected(base)


def test_no_hash(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = counting(monkeypatch)
    records = found(base, hash=False)
    assert records.keys() == expected(base).keys()
    assert set(records.values()) == {None}
    assert read == []


@pytest.mark.parametrize("hash", [True, False])
@pytest.mark.parametrize("how", ["written", "replaced", "gone"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_base_that_changes_meanwhile(base: Path, tmp_path: Path, hash: bool, how: str, cached: bool) -> None:
    if cached:
        found(base)
    file = base / "model-00002-of-00002.safetensors"
    (tmp_path / "out").mkdir()
    checkpoint = CheckpointFolder(base)
    with (
        pytest.raises(OutsideError, match="changed while it was read") as caught,
        hashing(checkpoint, hash=hash) as running,
    ):
        write_copy(checkpoint, tmp_path / "out", created={}, replaced={}, config_changes={})
        raw = file.read_bytes()
        if how == "written":
            with file.open("r+b") as handle:
                handle.seek(-1, os.SEEK_END)
                handle.write(b"!")
        else:
            file.unlink()
        if how == "replaced":
            file.write_bytes(raw)
        running.records()
    assert caught.value.exit_code == 3
    assert str(file) in str(caught.value)


def test_links_that_are_made_meanwhile_are_no_change(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = CheckpointFolder(base)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        read = counting(monkeypatch)
        with hashing(checkpoint) as running:
            write_copy(checkpoint, tmp_path / name, created={}, replaced={}, config_changes={}, link=True)
            records = {record["name"]: record["sha256"] for record in running.records()}
        assert records == expected(base)
        # A link dates the file anew; the next build knows the hash all the same.
        assert bool([file for file in read if file.endswith(".safetensors")]) is (name == "one")


def test_hashing_ends_with_the_block(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()

    def endless(_path: Path, stop: threading.Event) -> str:
        begun.set()
        assert stop.wait(60)
        return ""

    monkeypatch.setattr(hashes, "_sha256", endless)
    with pytest.raises(KeyboardInterrupt), hashing(CheckpointFolder(base)):
        assert begun.wait(10)
        raise KeyboardInterrupt
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hash")]


def test_an_unreadable_file(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path, _stop: threading.Event) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(hashes, "_sha256", fails)
    with pytest.raises(OutsideError, match="cannot be read"):
        found(base)


def test_what_differs_from_a_record(base: Path) -> None:
    records = file_records(base)
    recorded = Patch.model_validate({"base": {"model": "base", "files": records}})
    assert differing(base, records) == []
    require_recorded(base, recorded)
    raw = bytearray((base / "model-00001-of-00002.safetensors").read_bytes())
    raw[-1] ^= 1
    (base / "model-00001-of-00002.safetensors").write_bytes(raw)
    (base / "LICENSE").unlink()
    (base / "config.json").write_text("{ }")
    wrong = ["LICENSE", "config.json", "model-00001-of-00002.safetensors"]
    assert differing(base, records) == wrong
    with pytest.raises(InputError, match="not the base that the folder was made from"):
        require_recorded(base, recorded)
    # Without a hash there is only the size.
    unhashed = [{**record, "sha256": None} for record in records]
    assert differing(base, unhashed) == ["LICENSE", "config.json"]


def test_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCH_MODEL_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("PATCH_MODEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "patch-model"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "patch-model"
    assert "home" not in names(tmp_path)
