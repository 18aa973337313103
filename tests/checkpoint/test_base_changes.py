"""A base that changes between the time it is first read and the end of the build, and what is no change."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.hashes import files_now, hashing
from patcher.errors import CheckFailed, OutsideError


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A base of one's own."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "base"))


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\x00\x3c" * 4)


def in_anothers_place(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.rename(path)


CHANGES: dict[str, Callable[[Path], None]] = {
    "overwritten": overwrite,
    "another file": in_anothers_place,
    "shortened": lambda path: os.truncate(path, path.stat().st_size - 1),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_change_before_the_copy_is_noticed(folder: Path, change: str, name: str) -> None:
    base = CheckpointFolder(folder)
    opened = files_now(base)
    with hashing(base, since=opened):
        pass
    CHANGES[change](folder / name)
    with pytest.raises(OutsideError, match="the base changed") as caught, hashing(base, since=opened):
        raise AssertionError("nothing may be copied")
    assert (caught.value.code, caught.value.exit_code) == ("base_changed", 3)
    problem = caught.value.problems[0]
    assert problem.where == str(folder / name)
    assert problem.found == ("it is gone" if change == "removed" else "another content")
    assert problem.remedy


@pytest.mark.parametrize("change", CHANGES)
def test_what_fails_because_the_base_changed_says_so(folder: Path, change: str) -> None:
    with pytest.raises(OutsideError, match="the base changed"), hashing(CheckpointFolder(folder), hash=False):
        CHANGES[change](folder / "model.safetensors")
        raise CheckFailed("the folder is not steered as a hook steers the base")


def test_what_fails_for_another_reason_says_that(folder: Path) -> None:
    with pytest.raises(CheckFailed, match="not steered"), hashing(CheckpointFolder(folder)):
        raise CheckFailed("the folder is not steered as a hook steers the base")


def test_backups_and_links_are_no_change(folder: Path, tmp_path: Path) -> None:
    """They move the time of the last change of the inode, and nothing that is read."""
    base = CheckpointFolder(folder)
    opened = files_now(base)
    weights = base.path / "model.safetensors"
    (tmp_path / "backup").hardlink_to(weights)
    weights.chmod(0o640)
    assert weights.stat().st_ctime_ns > opened[Path("model.safetensors")].st_ctime_ns
    with hashing(base, since=opened) as running:
        assert running.records()
