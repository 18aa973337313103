"""An export appears whole or not at all, and replaces only an earlier one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from patcher.checkpoint.staging import disk_errors, scratch_folder
from patcher.errors import InputError
from patcher.export.format import Format


def check_target(output: Path, source: Path, chosen: Format, *, force: bool) -> None:
    """Refuse, before any work, an output that must not be written.

    Raises:
        InputError: it lies in the patched folder, or something is there that may not be replaced.
    """
    with disk_errors(output):
        target, folder = output.resolve(), source.resolve()
        if target == folder or folder in target.parents or target in folder.parents:
            raise InputError(
                "the export overlaps the patched folder, which is not changed",
                where=str(output),
                found=str(source),
                remedy="choose another place: --output",
            )
        for parent in target.parents:
            if parent.exists() and not parent.is_dir():
                raise InputError(
                    "the output lies in something that is not a folder",
                    where=str(output),
                    found=str(parent),
                    remedy="choose another place: --output",
                )
        if not (output.is_symlink() or target.exists()):
            return
        if target.is_dir() and not output.is_symlink() and not any(target.iterdir()):
            return
        if not force:
            remedy = "choose another place (--output), or replace it: --force"
            raise InputError("the output exists", where=str(output), remedy=remedy)
        if output.is_symlink() or not chosen.is_ours(target):
            raise InputError(
                "--force replaces only an earlier export of the same format, and this is none",
                where=str(output),
                remedy="choose another place (--output), or remove it yourself",
            )


@contextlib.contextmanager
def placed(output: Path, chosen: Format, *, force: bool) -> Iterator[Path]:
    """A path to write a file or folder at; it becomes ``output`` when the block ends without an error.

    Raises:
        InputError: something came in the way meanwhile.
        OutsideError: the disk is full, read-only, or forbids writing.
    """
    with disk_errors(output):
        target = output.resolve()
        with scratch_folder(target) as scratch:
            stage = scratch / target.name
            yield stage
            _sync(stage)
            check_target(output, scratch, chosen, force=force)
            replaced = scratch / f"{target.name}-old"
            if target.exists():
                target.rename(replaced)
            try:
                stage.rename(target)
            except BaseException:
                if replaced.exists():
                    replaced.rename(target)
                raise


def _sync(stage: Path) -> None:
    for item in [stage, *(stage.rglob("*") if stage.is_dir() else ())]:
        if item.is_file():
            item.chmod(0o644)  # safetensors creates its files with mode 0600
            with item.open("rb") as file:
                os.fsync(file.fileno())
