"""Verification when base and copy do not fit in memory: what goes to the disk, and whether the disk has room for it.

All passes go through the model side by side, and accelerate reads the weights of each block once for all of them, from
the checkpoint's own files (:mod:`patcher.verify.programs.side_by_side`). Stock transformers writes a copy only of what
is not stored as the class has it: experts that are stored apart and fused when loaded, and quantised weights that are
undone. A ``.bin`` checkpoint would be written out
whole, and tied weights are lost in that, so its safetensors stand in for it.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from patcher.architectures.model_class import on_meta, parameter_aliases, parameter_shapes, saved_names
from patcher.architectures.quantised import quantisation_of
from patcher.capture.memory import FOR_WEIGHTS
from patcher.checkpoint.bin_files import convert_bin
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.names import stored_name
from patcher.checkpoint.prepare import read_config
from patcher.checkpoint.sizes import FP32, file_bytes, fp32_bytes, largest_part, mapped_bytes
from patcher.disk.failures import disk_errors
from patcher.errors import InputError, OutsideError

RUNNER_BYTES = 400 << 20
"""What torch and transformers take before any weight is there."""
SMALL_HEAP: Mapping[str, str] = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_ARENA_MAX": "1"}
"""For the environment of a run that is spread: weights come and go with every module, and glibc's heap would keep the
holes that they leave, up to the size of the whole model; what it maps apart it gives back. Nor does each thread get a
heap of its own."""
_GB = 1e9
_SLACK = 64 << 20  # headers, whole blocks, and what the runs hand over
_DISK_MARKS = ("No space left on device", "Disk quota exceeded", "os error 28", "os error 122")
_MEMORY_MARKS = (
    "MemoryError", "OutOfMemoryError", "not enough memory", "can't allocate memory", "Cannot allocate memory",
    "os error 12)", "can't start new thread", "failed to map segment",
)  # fmt: skip


@dataclass(frozen=True)
class Offload:
    """How a run spreads a model over memory and disk.

    Attributes:
        folder: where what has to be written is written; each run leaves it empty.
        memory: bytes that weights may take in memory.
        base: the base that is run: the one given, or its safetensors.
        all: everything stays on the disk, as it is stored. Else the loader keeps in memory what it can, and writes what
            it had to convert.
    """

    folder: Path
    memory: int
    base: Path
    all: bool


def plan_offload(
    folder: Path,
    base: Path,
    scratch: Path,
    *,
    memory: int,
    address_space: int | None,
    trust_remote_code: bool = False,
) -> Offload | None:
    """How the base and the folder are run, one after the other, in fp32; None where each fits in memory.

    Args:
        folder: the patched folder, safetensors.
        base: the base.
        scratch: a folder on the disk that takes what has to be written.
        memory: bytes that can still be used, see :func:`patcher.capture.memory.available_memory`.
        address_space: what a limit on it leaves, see :func:`patcher.capture.memory.address_space_left`.

    Raises:
        OutsideError: what has to be written does not fit on the disk (code ``disk``), or the format cannot be spread
            over the disk (code ``memory``).
    """
    found = [CheckpointFolder(folder), CheckpointFolder(base)]
    readable = [checkpoint for checkpoint in found if not checkpoint.is_bin]
    allowed = int(FOR_WEIGHTS * memory)
    if address_space is not None:
        # All weight files are mapped at once, one of them twice, and that counts.
        allowed = min(allowed, int(FOR_WEIGHTS * address_space) - max(map(mapped_bytes, found)))
    allowed -= RUNNER_BYTES
    needed = max(map(fp32_bytes, readable))
    if needed <= allowed:
        return None
    allowed = max(0, allowed)
    _refuse_bitsandbytes(readable, needed, allowed)
    converted = file_bytes(found[1]) if found[1].is_bin else 0
    rewritten = [rewritten_bytes(one, trust_remote_code) for one in readable]
    written = max(min(size, _beyond(one, allowed)) for size, one in zip(rewritten, readable, strict=True))
    _require_room(scratch, converted + written, needed, allowed)
    if converted:
        with disk_errors(scratch, "the base as safetensors (for the verification)"):
            base = convert_bin(found[1], scratch / "base").path
    quantised = any(quantisation_of(one.config) is not None for one in readable)
    return Offload(scratch / "offload", allowed, base, all=not any(rewritten) and not quantised)


def rewritten_bytes(checkpoint: CheckpointFolder, trust_remote_code: bool = False) -> int:
    """The most bytes that transformers would write in fp32 if all of a safetensors checkpoint went to the disk.

    Those parameters of the class that no stored tensor of their shape stands for. Tensors under old names that only
    the loader knows count although they are not written.
    """
    quantisation = quantisation_of(checkpoint.config)
    if quantisation is not None:
        # What undoes a format goes over every tensor; where nothing is undone, the packed ones are taken as they are.
        return 0 if quantisation.dequantise is None else fp32_bytes(checkpoint)
    try:
        config = read_config(checkpoint.path, trust_remote_code=trust_remote_code)
        model = on_meta(config, trust_remote_code=trust_remote_code)
    except InputError:
        return 0  # the run itself says what is wrong
    shapes, aliases = parameter_shapes(model), parameter_aliases(model)
    prefix = str(getattr(model, "base_model_prefix", "") or "")
    stored = checkpoint.tensors

    def found(name: str, shape: tuple[int, ...]) -> bool:
        there = stored_name(name, stored, prefix)
        return there is not None and stored[there].shape == shape

    def is_stored(parameter: str) -> bool:
        shape = shapes[parameter]
        return found(parameter, shape) or found(_spelled(model, parameter), shape)

    return sum(FP32 * math.prod(shape) for name, shape in shapes.items() if name not in aliases and not is_stored(name))


def _spelled(model: nn.Module, parameter: str) -> str:
    try:
        return saved_names(model, [parameter])[parameter]
    except IndexError:
        return parameter  # fused of several tensors, so there is no one name


def _beyond(checkpoint: CheckpointFolder, allowed: int) -> int:
    # What is kept in memory leaves room for the largest part of the rest.
    return max(0, fp32_bytes(checkpoint) - max(0, allowed - 2 * largest_part(checkpoint)))


def _refuse_bitsandbytes(checkpoints: list[CheckpointFolder], needed: int, allowed: int) -> None:
    for checkpoint in checkpoints:
        quantisation = quantisation_of(checkpoint.config)
        if quantisation is not None and quantisation.dequantise == "method":
            raise OutsideError(
                f"verifying needs the model in fp32, and a {quantisation.method} checkpoint cannot be spread over the "
                "disk",
                where=str(checkpoint.path),
                found=f"{needed / _GB:.1f} GB in fp32, {allowed / _GB:.1f} GB of memory for it",
                remedy="use a machine (or a limit) with more memory, or the unquantised version of this model",
                code="memory",
            )


def _require_room(scratch: Path, wanted: int, needed: int, allowed: int) -> None:
    with disk_errors(scratch, "the verification's scratch folder"):
        free = shutil.disk_usage(scratch).free
    if wanted and wanted + _SLACK > free:
        raise OutsideError(
            "the model does not fit in memory, and the disk has no room for what the verification would write",
            where=str(scratch),
            found=f"{needed / _GB:.1f} GB in fp32 with {allowed / _GB:.1f} GB of memory; up to {wanted / _GB:.1f} GB "
            f"to write, {free / _GB:.1f} GB free",
            remedy="free some space there, use a machine (or a limit) with more memory, or work on another disk "
            "(--output for a build, TMPDIR for verify)",
            code="disk",
        )


def disk_is_full(stderr: str) -> bool:
    """Whether a run that died ran out of disk, by what it said."""
    return any(mark in stderr for mark in _DISK_MARKS)


def memory_is_full(returncode: int, stderr: str) -> bool:
    """Whether a run that died ran out of memory: it was killed, or an allocation was refused (``ulimit -v``)."""
    return returncode < 0 or any(mark in stderr for mark in _MEMORY_MARKS)
