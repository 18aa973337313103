"""What differs between two checkpoints: tensors, by their bytes, and the keys of config.json.

Headers are read whole; of the data, pieces of a fixed size at a time, and nothing where both are one file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from patcher.checkpoint.bin_files import load_bin
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.safetensors_file import DTYPES, TensorInfo, read_header, tensor_bytes
from patcher.checkpoint.safetensors_writer import DTYPE_NAMES

PIECE = 1 << 20
"""Bytes of each side that are held at once."""


@dataclass(frozen=True)
class TensorChange:
    """One tensor that differs.

    Attributes:
        name: in the second checkpoint (in the first, of one that was removed).
        dtype: [first, second], safetensors dtypes; None where it is not.
        shape: the same.
        elements: how many numbers differ; None where they cannot be compared one by one.
        max_abs_difference: the largest; None where they cannot be compared, or one of them is infinite or no number.
        was: its name in the first checkpoint, if it has another.
    """

    name: str
    dtype: tuple[str | None, str | None]
    shape: tuple[list[int] | None, list[int] | None]
    elements: int | None = None
    max_abs_difference: float | None = None
    was: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "dtype": list(self.dtype), "shape": list(self.shape)}


@dataclass
class Difference:
    """What :func:`compare` found. ``renamed`` are equal but for their names; ``config`` keys are joined by dots."""

    added: list[TensorChange] = field(default_factory=list)
    removed: list[TensorChange] = field(default_factory=list)
    changed: list[TensorChange] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    same: int = 0
    bytes_compared: int = 0
    config_added: dict[str, Any] = field(default_factory=dict)
    config_removed: dict[str, Any] = field(default_factory=dict)
    config_changed: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def nothing(self) -> bool:
        config = self.config_added or self.config_removed or self.config_changed
        return not (self.added or self.removed or self.changed or self.renamed or config)

    @property
    def largest(self) -> float | None:
        """The largest absolute difference of a number; None where there is more than that, or no finite one."""
        values = [change.max_abs_difference for change in self.changed]
        known = [value for value in values if value is not None]
        whole = not (self.added or self.removed) and len(known) == len(values)
        return max(known, default=0.0) if whole else None

    def as_json(self) -> dict[str, Any]:
        return {
            "same": self.nothing,
            "tensors": {
                "added": [change.as_json() for change in self.added],
                "removed": [change.as_json() for change in self.removed],
                "changed": [change.as_json() for change in self.changed],
                "renamed": self.renamed,
                "same": self.same,
            },
            "config": {"added": self.config_added, "removed": self.config_removed, "changed": self.config_changed},
            "bytes_compared": self.bytes_compared,
        }


def compare(first: CheckpointFolder, second: CheckpointFolder, renamed: Mapping[str, str] | None = None) -> Difference:
    """Compare two checkpoints, of any layout.

    Args:
        renamed: tensor of the first -> its name in the second; names that either lacks are ignored.

    Raises:
        InputError: a weight file is missing or damaged.
    """
    found = _compare_all(_tensors(first), _tensors(second), renamed or {})
    _compare_configs(first.config, second.config, "", found)
    return found


def compare_files(first: Path, second: Path) -> Difference:
    """Compare two safetensors files, as :func:`compare` does.

    Raises:
        InputError: one of them is damaged.
    """
    return _compare_all(_stored(read_header(first)), _stored(read_header(second)), {})


def _compare_all(before: Mapping[str, _Tensor], after: Mapping[str, _Tensor], renamed: Mapping[str, str]) -> Difference:
    found = Difference()
    names = {old: new for old, new in renamed.items() if old in before and new in after}
    pairs = {**{name: name for name in before if name in after and name not in names.values()}, **names}
    with ExitStack() as stack:
        files = _Files(stack)
        for old, new in pairs.items():
            _compare(before[old], after[new], old, new, files, found)
    found.removed = [
        TensorChange(name, (tensor.dtype, None), (tensor.shape, None))
        for name, tensor in before.items()
        if name not in pairs
    ]
    new_names = set(pairs.values())
    found.added = [
        TensorChange(name, (None, tensor.dtype), (None, tensor.shape))
        for name, tensor in after.items()
        if name not in new_names
    ]
    found.bytes_compared = files.read
    return found


class _Files:
    """Open files, and the two buffers that everything is read into."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack, self._open = stack, dict[Path, BinaryIO]()
        self.read = 0

    def piece(self, path: Path, start: int, size: int) -> bytearray:
        if path not in self._open:
            # Two files are open at a time, however many shards there are.
            if len(self._open) > 1:
                self._open.pop(next(iter(self._open))).close()
            self._open[path] = self._stack.enter_context(path.open("rb", buffering=0))
        file, piece, done = self._open[path], bytearray(size), 0
        file.seek(start)
        while done < size and (count := file.readinto(memoryview(piece)[done:])):  # type: ignore[attr-defined]
            done += count
        self.read += done
        return piece


@dataclass(frozen=True)
class _Tensor:
    """A tensor in a safetensors file, or one of a ``.bin`` file, mapped into memory where its format allows."""

    dtype: str
    shape: list[int]
    size: int
    held: TensorInfo | torch.Tensor

    def bytes(self, start: int, size: int, files: _Files) -> bytearray | memoryview:
        if isinstance(self.held, TensorInfo):
            return files.piece(self.held.file, self.held.start + start, size)
        item = self.held.dtype.itemsize
        return bytearray(tensor_bytes(self.held.reshape(-1)[start // item : (start + size) // item]))


def _stored(tensors: Mapping[str, TensorInfo]) -> dict[str, _Tensor]:
    return {name: _Tensor(info.dtype, list(info.shape), info.size, info) for name, info in tensors.items()}


def _tensors(checkpoint: CheckpointFolder) -> dict[str, _Tensor]:
    if not checkpoint.is_bin:
        return _stored(checkpoint.tensors)
    loaded = (load_bin(checkpoint.path / name) for name in checkpoint.weight_files)
    return {
        name: _Tensor(DTYPE_NAMES[tensor.dtype], list(tensor.shape), tensor.nbytes, tensor)
        for state in loaded
        for name, tensor in state.items()
    }


def _compare(before: _Tensor, after: _Tensor, old: str, new: str, files: _Files, found: Difference) -> None:
    was = old if old != new else None
    change = TensorChange(new, (before.dtype, after.dtype), (before.shape, after.shape), was=was)
    if before.shape != after.shape:
        found.changed.append(change)
        return
    same, elements, largest = _contents(before, after, files)
    if not same:
        found.changed.append(replace(change, elements=elements, max_abs_difference=largest))
    elif was is None:
        found.same += 1
    else:
        found.renamed[old] = new


def _one_place(before: _Tensor, after: _Tensor) -> bool:
    """Whether both are the same bytes of the same file, as hard links make them."""
    first, second = before.held, after.held
    if not isinstance(first, TensorInfo) or not isinstance(second, TensorInfo) or first.start != second.start:
        return False
    return os.path.samestat(first.file.stat(), second.file.stat())


def _contents(before: _Tensor, after: _Tensor, files: _Files) -> tuple[bool, int | None, float | None]:
    """Whether dtype and bytes are equal; how many numbers differ, and by how much at most."""
    if _one_place(before, after):
        return True, None, None
    alike = before.dtype == after.dtype and before.size == after.size
    if before.dtype not in DTYPES or after.dtype not in DTYPES:
        starts = range(0, before.size, PIECE) if alike else range(0)
        sizes = ((start, min(PIECE, before.size - start)) for start in starts)
        return alike and all(before.bytes(*at, files) == after.bytes(*at, files) for at in sizes), None, None
    dtypes = DTYPES[before.dtype], DTYPES[after.dtype]
    count, differ, largest, same = math.prod(before.shape), 0, 0.0, alike
    step = PIECE // max(dtype.itemsize for dtype in dtypes)
    for start in range(0, count, step):
        length = min(step, count - start)
        raw = [
            side.bytes(start * dtype.itemsize, length * dtype.itemsize, files)
            for side, dtype in zip((before, after), dtypes, strict=True)
        ]
        if alike and raw[0] == raw[1]:
            continue
        same = False
        left, right = (_wide(part, dtype) for part, dtype in zip(raw, dtypes, strict=True))
        different = (left != right) & ~(left.isnan() & right.isnan())
        apart = (left - right).abs()[different]
        differ += apart.numel()
        # The difference of what is not a number, or infinite, is none.
        largest = max(largest, float(apart.nan_to_num(math.inf, math.inf).max()) if apart.numel() else 0.0)
    return same, differ, largest if math.isfinite(largest) else None


def _wide(raw: bytearray | memoryview, dtype: torch.dtype) -> torch.Tensor:
    values = torch.frombuffer(raw, dtype=dtype)
    if dtype.is_complex:
        return values.to(torch.complex128)
    # There is no direct way from every 8-bit format to double.
    return values.float().double() if dtype.itemsize == 1 else values.double()


def _compare_configs(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str, found: Difference) -> None:
    for key in [*before, *(key for key in after if key not in before)]:
        name = prefix + key
        if key not in after:
            found.config_removed[name] = before[key]
        elif key not in before:
            found.config_added[name] = after[key]
        elif isinstance(before[key], dict) and isinstance(after[key], dict):
            _compare_configs(before[key], after[key], name + ".", found)
        elif before[key] != after[key] or type(before[key]) is not type(after[key]):
            found.config_changed[name] = [before[key], after[key]]
