"""A patched GGUF model, written beside its source or into it: whole or not at all, and read back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patcher.checkpoint.copying import place_file
from patcher.checkpoint.gguf.file import read_floats, read_gguf
from patcher.checkpoint.gguf.in_place import patch_files_in_place
from patcher.checkpoint.gguf.model import GgufModel, split_name
from patcher.checkpoint.staging import scratch_folder
from patcher.disk.failures import disk_errors
from patcher.disk.whole_files import settle, sync_folder
from patcher.errors import CheckFailed, InputError, OutsideError
from patcher.gguf import provenance
from patcher.gguf.edits import GgufEdit
from patcher.gguf.plan import FilePlan, GgufPlan, plan_gguf
from patcher.progress.stage import BYTES, Say, bytes_in, doing, silent
from patcher.stacks.names import LLAMA_CPP


@dataclass(frozen=True)
class GgufResult:
    """What was written.

    Attributes:
        files: of the patched model, the one to load first.
        plan: what was done.
        edits: the vectors.
        copied: bytes that came from the source.
        new: bytes that did not.
        linked: files that are hard links to the source's.
    """

    files: tuple[Path, ...]
    plan: GgufPlan
    edits: tuple[GgufEdit, ...]
    copied: int
    new: int
    linked: int

    def as_json(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "output": str(self.files[0]),
            "files": [str(file) for file in self.files],
            "architecture": plan.architecture,
            "relabelled": plan.relabelled,
            "edits": [{**edit.as_json(), "tensor": plan.slots[edit.layer].name} for edit in self.edits],
            "tensors": [
                {"name": slot.name, "kind": "created" if slot.existing is None else "added", "factor": slot.factor}
                for slot in plan.slots.values()
            ],
            "bytes_written": self.new + self.copied,
            "bytes_new": self.new,
            "files_linked": self.linked,
            "verification": [{"stack": LLAMA_CPP, "status": "structural", "passed": True}],
            "notes": list(plan.notes),
        }


def check_target(model: GgufModel, output: Path, *, force: bool) -> list[Path]:
    """The files that the copy will be; refused, before any work, where they must not be written.

    Raises:
        InputError: something is in the way.
    """
    if output.suffix != ".gguf":
        raise InputError("the output's name must end in .gguf", where=str(output), remedy="add it")
    if not output.parent.is_dir():
        raise InputError(
            "the folder of the output is not there", where=str(output.parent), remedy="create it, or choose another"
        )
    count = len(model.files)
    targets = [output] if count == 1 else [split_name(output, number, count) for number in range(count)]
    there = [target for target in targets if target.exists() or target.is_symlink()]
    sources = {file.path.resolve() for file in model.files}
    for target in targets:
        if target.resolve() in sources:
            raise InputError(
                "the output is the source, which is not written to",
                where=str(target),
                remedy="choose another name, or --in-place",
            )
    if there and not force:
        raise _exists(there[0])
    if there and not _is_ours(targets[0]):
        raise InputError(
            "--force replaces only a GGUF model that patch-model wrote, and this is none",
            where=str(there[0]),
            remedy="choose another name, or remove it yourself",
        )
    return targets


def write_patched(
    model: GgufModel,
    edits: Sequence[GgufEdit],
    output: Path,
    *,
    add: bool,
    link: bool,
    force: bool,
    say: Say = silent,
) -> GgufResult:
    """Write a patched copy of the model; the source is not changed.

    Args:
        model: the source.
        edits: what to add.
        output: the file, or the name from which a split model's names follow.
        add: let the vectors add up with those of an earlier patch.
        link: place unchanged files of a split model as hard links.
        force: replace an earlier output of ours.
        say: told what is going on.

    Raises:
        InputError: see :func:`check_target` and :func:`plan_gguf`.
        OutsideError: the disk failed, or the source changed meanwhile; nothing is left.
        CheckFailed: what was written is not what was planned; nothing is left.
    """
    targets = check_target(model, output, force=force)
    plan = plan_gguf(model, edits, add=add)
    before = [_state(file.path) for file in model.files]
    with _disk(output), scratch_folder(targets[0]) as stage:
        staged = [stage / target.name for target in targets]
        size = sum(file.path.stat().st_size for file in model.files)
        with doing(say, f"writing {output.name}", size, BYTES, lambda: bytes_in(stage)):
            counts = [_place(file, path, link) for file, path in zip(plan.files, staged, strict=True)]
        copied, new, linked = (sum(column) for column in zip(*counts, strict=True))
        if [_state(file.path) for file in model.files] != before:
            raise OutsideError(
                "the source changed while it was copied; nothing is left of the output",
                where=str(model.first.path),
                remedy="run it again when nothing else writes to it",
                code="disk",
            )
        _check(plan, staged)
        _publish(staged, targets, force=force)
    return GgufResult(tuple(targets), plan, tuple(edits), copied, new, linked)


def patch_in_place(model: GgufModel, edits: Sequence[GgufEdit], *, add: bool) -> GgufResult:
    """Patch the model's own files, moving none of their bytes through memory.

    Raises:
        InputError: the model would have to be relabelled, or a file has other names; and see :func:`plan_gguf`.
        OutsideError: the file system cannot insert bytes into a file.
    """
    plan = plan_gguf(model, edits, add=add)
    if plan.relabelled:
        raise InputError(
            f"a {plan.relabelled} file is relabelled as {plan.architecture}, which moves rows in all of it",
            where=str(model.first.path),
            remedy="write a copy: leave out --in-place and name an output",
        )
    changed = [(file.source, file.new) for file in plan.files if file.changed]
    with _disk(model.first.path):
        new = patch_files_in_place(changed)
    files = tuple(file.path for file in model.files)
    _check(plan, list(files))
    return GgufResult(files, plan, tuple(edits), 0, new, 0)


def _place(file: FilePlan, path: Path, link: bool) -> tuple[int, int, int]:
    """Write one file of the copy: bytes that came from the source, bytes that did not, and how many files are links."""
    if not file.changed:
        placed = place_file(file.source.path, path, link=link)
        return (0, 0, 1) if placed.how == "hard_link" else (placed.size, 0, 0)
    with path.open("xb") as target:
        written = file.new.write(target)
    return written.copied, written.new, 0


def _check(plan: GgufPlan, paths: Sequence[Path]) -> None:
    """Read the headers back, and the values that are new."""
    files = [read_gguf(path) for path in paths]
    found = {name: tensor for file in files for name, tensor in file.tensors.items()}
    for file, there in zip(plan.files, files, strict=True):
        planned = [(tensor.name, tensor.shape, tensor.type) for tensor in file.new.tensors]
        if planned != [(tensor.name, tensor.shape, tensor.type) for tensor in there.tensors.values()]:
            raise _unlike(there.path, "its tensors are not those that were planned")
    for name, values in plan.values.items():
        if not bool((read_floats(found[name]) == values).all()):
            raise _unlike(found[name].file, f"{name} does not hold what was planned")
    edits = len(provenance.read_edits(files[0]))
    if not edits or files[0].scalar("general.architecture") != plan.architecture:
        raise _unlike(files[0].path, "its metadata are not those that were planned")


def _publish(staged: Sequence[Path], targets: Sequence[Path], *, force: bool) -> None:
    for path in staged:
        settle(path)
    placed: list[Path] = []
    try:
        # Without its first file nothing loads a split model: it goes first, and comes last.
        if force and len(targets) > 1:
            targets[0].unlink(missing_ok=True)
        for path, target in reversed(list(zip(staged, targets, strict=True))):
            if force:
                path.replace(target)
            else:
                _place_new(path, target)
                placed.append(target)
    except BaseException:
        for target in placed:
            target.unlink(missing_ok=True)
        raise
    sync_folder(targets[0].parent)


def _place_new(path: Path, target: Path) -> None:
    try:
        # Unlike a rename, a link never replaces what another process put there meanwhile.
        os.link(path, target)
    except FileExistsError:
        raise _exists(target) from None
    except OSError:
        path.rename(target)


def _exists(target: Path) -> InputError:
    return InputError("the output exists", where=str(target), remedy="choose another name, or replace it: --force")


def _is_ours(path: Path) -> bool:
    try:
        return any(provenance.is_ours(key) for key in read_gguf(path).entries)
    except InputError:
        return False


def _state(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _unlike(path: Path, what: str) -> CheckFailed:
    return CheckFailed(f"the file that was written is not right: {what}", where=str(path), remedy="report this")


@contextlib.contextmanager
def _disk(output: Path) -> Iterator[None]:
    try:
        with disk_errors(output):
            yield
    except OutsideError as error:
        problem = error.problems[0]
        # There is no such option here.
        remedy = None if problem.remedy is None else problem.remedy.replace(" with --output", "")
        raise error.with_remedy(remedy) from None
