"""Unchanged bytes: linked, shared or copied by the kernel; the base is never written through a link."""

from __future__ import annotations

import errno
import io
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import HIDDEN, load, logits, same_bits, stored
from support.placing import BIAS, copy, counts, linked, own_copy, states

from patcher.checkpoint import copying as sharing
from patcher.checkpoint import writer
from patcher.checkpoint.copying import place_file
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.safetensors_file import read_header, read_tensor
from patcher.checkpoint.staging import staged_folder
from patcher.checkpoint.writer import write_copy

Checkpoint = Callable[..., Path]


@pytest.fixture
def base(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A sharded GPT-2 of our own, whose files have a mode that nobody else gives."""
    return own_copy(checkpoint("gpt2", sharded=True), tmp_path / "base")


# Hard links


def test_unchanged_shards_become_links(base: Path, place: Path) -> None:
    before = states(base)
    written = copy(base, place / "out", link=True, created={})
    weights = CheckpointFolder(base).weight_files
    assert linked(base, place / "out").keys() == set(weights)
    assert counts(written)["hard_link"] == len(weights)
    size = sum((base / name).stat().st_size for name in weights)
    assert written.placed["files"]["hard_link"]["bytes"] == size
    assert written.placed["not_linked"] is None
    total = sum(item.stat().st_size for item in (place / "out").iterdir())
    assert written.bytes_written <= total - size < size / 4
    assert states(base) == before, "the base's content or mode changed"
    assert torch.equal(logits(load(place / "out")), logits(load(base)))


def test_without_being_asked_nothing_is_linked(base: Path, place: Path) -> None:
    written = copy(base, place / "out")
    assert linked(base, place / "out") == {}
    assert "hard_link" not in counts(written)
    assert all(stat.S_IMODE(item.stat().st_mode) == 0o644 for item in (place / "out").iterdir())


def test_only_weights_are_linked(base: Path, place: Path) -> None:
    (base / "tokenizer.json").write_text("{}")
    copy(base, place / "out", link=True)
    for name in ("tokenizer.json", "config.json", "generation_config.json"):
        assert (place / "out" / name).stat().st_nlink == 1


def test_a_patched_shard_is_copied_and_the_base_keeps_its_bytes(base: Path, place: Path) -> None:
    before, info = states(base), CheckpointFolder(base).tensors[BIAS]
    value = read_tensor(info) + 1
    written = copy(base, place / "out", link=True, created={}, replaced={BIAS: value})
    shared = linked(base, place / "out")
    assert info.file.name not in shared
    assert len(shared) == len(CheckpointFolder(base).weight_files) - 1 > 0
    assert written.placed["patched"] == {"count": 1, "bytes": 4 * HIDDEN}
    assert states(base) == before
    assert same_bits(stored(place / "out")[BIAS], value)


def test_a_rewritten_shard_is_no_link(base: Path, place: Path) -> None:
    before, info = states(base), CheckpointFolder(base).tensors[BIAS]
    written = copy(base, place / "out", link=True, renamed={BIAS: "another"})
    assert info.file.name not in linked(base, place / "out")
    assert counts(written)["rewritten"] == 1
    assert states(base) == before


def test_writing_to_a_link_is_refused(base: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should a link ever be where something is patched, the base must not pay for it."""
    monkeypatch.setattr(writer, "place_file", lambda source, target, link=False: place_file(source, target, link=True))
    before = states(base)
    with pytest.raises(ValueError, match="not written to"):
        copy(base, place / "out", link=True, replaced={BIAS: torch.zeros(HIDDEN)})
    assert states(base) == before
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("exchange", [True, False], ids=["renameat2", "two renames"])
def test_replacing_and_removing_a_linked_folder(
    base: Path, place: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr("ctypes.CDLL", lambda *_args, **_keys: (_ for _ in ()).throw(OSError()))
    before, output = states(base), place / "out"
    copy(base, output, link=True)
    copy(base, output, link=True, force=True, created={"other": torch.zeros(3)})
    assert linked(base, output).keys() == set(CheckpointFolder(base).weight_files)
    assert "other" in stored(output)
    assert states(base) == before
    copy(base, output, force=True)
    assert linked(base, output) == {}
    copy(base, output, link=True, force=True)
    shutil.rmtree(output)
    assert states(base) == before
    assert all(file.stat().st_nlink == 1 for file in base.iterdir())


def test_a_failed_build_with_links_leaves_the_base(base: Path, place: Path) -> None:
    before = states(base)
    with pytest.raises(ZeroDivisionError), staged_folder(place / "out") as stage:
        write_copy(CheckpointFolder(base), stage, created={}, replaced={}, config_changes={}, link=True)
        raise ZeroDivisionError
    assert states(base) == before
    assert list(place.iterdir()) == []


def test_the_symlinks_of_the_hub_cache_are_resolved(base: Path, tmp_path: Path, place: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / ("c" * 40)
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(base.iterdir())):
        shutil.copy2(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    before = states(blobs)
    copy(snapshot, place / "out", link=True, created={})
    assert not any(file.is_symlink() for file in (place / "out").iterdir())
    inodes = {file.stat().st_ino for file in blobs.iterdir()}
    weights = [file for file in (place / "out").glob("model-*.safetensors") if file.stat().st_ino in inodes]
    assert len(weights) == len(CheckpointFolder(base).weight_files)
    assert states(blobs) == before
    # What it was linked to may go, and the copy stays whole.
    shutil.rmtree(tmp_path / "snapshots")
    shutil.rmtree(blobs)
    load(place / "out")


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EXDEV, "another disk"), (errno.EPERM, "not permitted"), (errno.EMLINK, "many links")],
)
def test_where_no_link_can_be_made_the_file_is_copied_and_it_is_said(
    base: Path, place: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def refuse(*_args: object, **_keys: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    written = copy(base, place / "out", link=True)
    assert "hard_link" not in counts(written)
    assert words in written.placed["not_linked"]
    assert linked(base, place / "out") == {}
    for old, new in zip(CheckpointFolder(base).weight_files, sorted(stored_files(place / "out")), strict=False):
        assert (place / "out" / new).read_bytes() == (base / old).read_bytes()


def stored_files(folder: Path) -> list[str]:
    return [file.name for file in folder.glob("model-*.safetensors")]


def test_another_disk_for_real(base: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == base.stat().st_dev:
        pytest.skip("there is no second file system")
    output = memory / f"patch-model-test-{os.getpid()}"
    try:
        written = copy(base, output, link=True, created={})
        assert "another disk" in written.placed["not_linked"]
        assert counts(written).keys() <= {"read_write", "copy_file_range", "reflink", "new"}
        load(output)
    finally:
        shutil.rmtree(output, ignore_errors=True)


def test_other_failures_of_a_link_are_errors(base: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_keys: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(Exception, match="could not be written"):
        copy(base, place / "out", link=True)


# A patch in place


class Watched:
    """A file object that counts what is read from it and written to it."""

    def __init__(self, file: Any, log: list[tuple[str, str, int]], path: Path) -> None:
        self._file, self._log, self._path = file, log, path

    def read(self, *size: int) -> bytes:
        data: bytes = self._file.read(*size)
        self._log.append(("read", self._path.name, len(data)))
        return data

    def readinto(self, buffer: Any) -> int:
        count: int = self._file.readinto(buffer)
        self._log.append(("read", self._path.name, count))
        return count

    def write(self, data: Any) -> int:
        self._log.append(("write", self._path.name, len(data)))
        count: int = self._file.write(data)
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def test_only_the_bias_passes_through_python(base: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each file the header is read, of one the bias; the rest is the kernel's."""
    checkpoint = CheckpointFolder(base)
    info, value = checkpoint.tensors[BIAS], torch.full((HIDDEN,), 7.0)
    log: list[tuple[str, str, int]] = []
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *args, **keys: Watched(opened(path, *args, **keys), log, path))
    (place / "out").mkdir()
    write_copy(checkpoint, place / "out", created={}, replaced={BIAS: value}, config_changes={})
    monkeypatch.undo()
    headers = {name: min(info.start for info in read_header(base / name).values()) for name in checkpoint.weight_files}
    for name in checkpoint.weight_files:
        read = sum(size for what, file, size in log if what == "read" and file == name)
        wrote = [size for what, file, size in log if what == "write" and file == name]
        bias = 4 * HIDDEN if name == info.file.name else 0
        assert read <= 2 * headers[name] + bias
        assert wrote == ([bias] if bias else [])
        old, new = bytearray((base / name).read_bytes()), (place / "out" / name).read_bytes()
        if bias:
            old[info.start : info.end] = value.numpy().tobytes()
        assert bytes(old) == new


class _NeverCut(io.FileIO):
    def truncate(self, size: int | None = None, /) -> int:
        raise AssertionError(f"cut to {size}: ext4 then waits for the disk when the file is closed")


def test_a_file_that_cannot_be_shared_is_not_cut(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was written, so there is nothing to take away; what a failed attempt did write goes."""

    def fails(*_arguments: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "no reflinks here")

    monkeypatch.setattr(sharing.fcntl, "ioctl", fails)
    source = place / "source"
    source.write_bytes(b"x" * 10_000)
    with source.open("rb") as reader, _NeverCut(place / "target", "w") as writer:
        assert not sharing.clone_file(reader, writer)  # type: ignore[arg-type]
        writer.write(b"y" * 4096)
        assert not sharing.clone_range(reader, writer, 0, 4096, 4096)  # type: ignore[arg-type]
        with pytest.raises(AssertionError, match="cut to 0"):
            sharing.clone_file(reader, writer)  # type: ignore[arg-type]
