"""Blocks that the copy shares with its base, where the file system can; elsewhere the bytes are copied."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import HIDDEN, hashes, same_bits, stored
from support.placing import BIAS, copy, counts, linked, own_copy

from patcher.checkpoint import copying
from patcher.checkpoint import copying as sharing
from patcher.checkpoint.copying import append_range
from patcher.checkpoint.folder import CheckpointFolder

Checkpoint = Callable[..., Path]

PAGE = copying.PAGE


@pytest.fixture
def base(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A sharded GPT-2 of our own, whose files have a mode that nobody else gives."""
    return own_copy(checkpoint("gpt2", sharded=True), tmp_path / "base")


def emulated(monkeypatch: pytest.MonkeyPatch, *, fails: bool = False) -> list[tuple[int, int, int]]:
    """A kernel whose file system shares blocks, and is as strict about them; what it was asked for."""
    asked: list[tuple[int, int, int]] = []

    def ioctl(target: int, request: int, argument: Any) -> int:
        if fails:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        if request == sharing._FICLONE:
            source, start, size, place = argument, 0, os.fstat(argument).st_size, 0
        else:
            assert request == sharing._FICLONERANGE
            source, start, size, place = struct.unpack("=qQQQ", argument)
            if start % PAGE or size % PAGE or place % PAGE:
                raise OSError(errno.EINVAL, "unaligned")
        asked.append((start, size, place))
        os.pwrite(target, os.pread(source, size, start), place)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    return asked


def test_a_file_system_that_shares_blocks(base: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = emulated(monkeypatch)
    monkeypatch.setattr(os, "copy_file_range", lambda *_args, **_keys: pytest.fail("copied"))
    written = copy(base, place / "out", replaced={BIAS: torch.zeros(HIDDEN)})
    weights = CheckpointFolder(base).weight_files
    assert counts(written)["reflink"] == len(weights) + len(CheckpointFolder(base).side_files())
    assert len(asked) == counts(written)["reflink"]
    new = written.placed["files"]["new"]["bytes"]
    assert written.bytes_written == new + 4 * HIDDEN
    assert linked(base, place / "out") == {}
    assert torch.equal(stored(place / "out")[BIAS], torch.zeros(HIDDEN))
    assert all(stat.S_IMODE(item.stat().st_mode) == 0o644 for item in (place / "out").iterdir())


def test_a_sharing_that_fails_half_way_leaves_nothing_of_itself(
    base: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ioctl(target: int, _request: int, _argument: Any) -> int:
        os.pwrite(target, b"rubbish" * 10**5, 0)
        raise OSError(errno.EIO, "half")

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    copy(base, place / "out", created={})
    for name in CheckpointFolder(base).weight_files:
        assert (place / "out" / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("kernel", ["shares", "does not"])
@pytest.mark.parametrize("start", [0, 1, 4095, 4096, 10_000])
@pytest.mark.parametrize("place_at", [0, 1, 4095, 4096, 1808])
@pytest.mark.parametrize("size", [0, 1, 4096, 9000, 50_000])
def test_ranges_are_appended_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str, start: int, place_at: int, size: int
) -> None:
    asked = emulated(monkeypatch, fails=kernel != "shares")
    content, front = os.urandom(70_000), os.urandom(place_at)
    (tmp_path / "source").write_bytes(content)
    with (tmp_path / "source").open("rb") as reader, (tmp_path / "target").open("wb") as target:
        target.write(front)
        done, shared = append_range(reader, target, start, size)
        target.write(b"end")
    assert (tmp_path / "target").read_bytes() == front + content[start : start + size] + b"end"
    assert done == size
    head = -start % PAGE
    alike = kernel == "shares" and start % PAGE == place_at % PAGE and size - head >= PAGE
    assert shared == ((size - head) // PAGE * PAGE if alike else 0)
    assert len(asked) == int(alike)


def test_a_rewritten_shard_shares_its_data(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its header is filled up, so that the data lies in its blocks as it did."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    rows = {f"layers.{number}.weight": torch.randn(1000, 300) for number in range(3)}
    save_file(rows, base / "model.safetensors", {"format": "pt"})
    renamed = {name: name.replace("layers.", "model.with.a.longer.prefix.layers.1") for name in rows}
    emulated(monkeypatch)
    written = copy(base, place / "out", created={}, renamed=renamed)
    found = load_file(place / "out" / "model.safetensors")
    assert found.keys() == set(renamed.values())
    assert all(same_bits(found[new], rows[old]) for old, new in renamed.items())
    size = (place / "out" / "model.safetensors").stat().st_size
    assert size - (base / "model.safetensors").stat().st_size < PAGE + 500
    assert written.bytes_written < 4 * PAGE
    # Where nothing is shared, the bytes are the same.
    emulated(monkeypatch, fails=True)
    again = copy(base, place / "again", created={}, renamed=renamed)
    assert again.bytes_written > size
    assert hashes(place / "again") == hashes(place / "out")


def test_small_shards_are_not_filled_up(base: Path, place: Path) -> None:
    info = CheckpointFolder(base).tensors[BIAS]
    copy(base, place / "out", created={}, renamed={BIAS: BIAS + ".x"})
    header = (place / "out" / info.file.name).read_bytes()
    length = int.from_bytes(header[:8], "little")
    assert length - len(header[8 : 8 + length].rstrip(b" ")) < 8


@pytest.fixture(params=["btrfs", "xfs"])
def sharing_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system that has reflinks, where we may make and mount one."""
    make, mount = shutil.which(f"mkfs.{request.param}"), shutil.which("mount")
    if not make or not mount or os.geteuid() != 0:
        pytest.skip(f"no mkfs.{request.param}, or may not mount")
    image, disk = tmp_path / "image", tmp_path / "disk"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(400 << 20)
    subprocess.run([make, str(image)], capture_output=True, check=True)
    if subprocess.run([mount, "-o", "loop", str(image), str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("may not mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_shared_blocks_for_real(sharing_disk: Path, checkpoint: Checkpoint) -> None:
    base = Path(shutil.copytree(checkpoint("gpt2", sharded=True), sharing_disk / "base"))
    before = hashes(base)
    written = copy(base, sharing_disk / "out", replaced={BIAS: torch.zeros(HIDDEN)})
    assert counts(written)["reflink"] >= len(CheckpointFolder(base).weight_files)
    assert torch.equal(stored(sharing_disk / "out")[BIAS], torch.zeros(HIDDEN))
    assert hashes(base) == before, "a write to the copy reached the base"


def test_the_summary_is_json(base: Path, place: Path) -> None:
    written = copy(base, place / "out", link=True, replaced={BIAS: torch.zeros(HIDDEN)})
    assert json.loads(json.dumps(written.placed)) == written.placed
    assert set(written.placed) == {"files", "patched", "not_linked"}
    assert json.loads(json.dumps(written.undo)) == written.undo
