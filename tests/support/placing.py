"""Copies, what the writer says of them, and what of their base must stay as it is."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path
from typing import Any

import torch
from support.checkpoints import hashes

from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.staging import staged_folder
from patcher.checkpoint.steering_files import MANIFEST
from patcher.checkpoint.writer import Written, write_copy

BIAS = "transformer.h.1.mlp.c_proj.bias"


def copy(base: Path, output: Path, *, force: bool = False, **keys: Any) -> Written:
    given: dict[str, Any] = {"created": {"extra": torch.ones(2)}, "replaced": {}, "config_changes": {}, **keys}
    with staged_folder(output, force=force) as stage:
        written = write_copy(CheckpointFolder(base), stage, **given)
        (stage / MANIFEST).write_text("{}")
    return written


def own_copy(base: Path, folder: Path) -> Path:
    """Of a checkpoint that tests share; its files have a mode that nobody else gives."""
    shutil.copytree(base, folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o640)
    return folder


def counts(written: Written) -> dict[str, int]:
    return {way: entry["count"] for way, entry in written.placed["files"].items()}


def states(folder: Path) -> dict[str, tuple[int, int, int, str]]:
    """Mode, size, time of the last write and content of every file: what a copy must not change in its base."""
    found = {}
    for name, digest in hashes(folder).items():
        now = (folder / name).stat()
        found[name] = (stat.S_IMODE(now.st_mode), now.st_size, now.st_mtime_ns, digest)
    return found


def linked(base: Path, output: Path) -> dict[str, str]:
    """Weight file of the base -> of the copy that is the same file."""
    inodes = {file.stat().st_ino: file.name for file in base.glob("*.safetensors")}
    here = {file.name: file.stat().st_ino for file in output.glob("*.safetensors")}
    return {inodes[inode]: name for name, inode in here.items() if inode in inodes}
