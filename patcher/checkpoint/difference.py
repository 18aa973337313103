"""What differs between two checkpoints: tensors, by their bytes, and the keys of config.json.

Headers are read whole; of the data, pieces of a fixed size at a time, and nothing where both are one file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from patcher.checkpoint.bin_files import load_bin
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.safetensors_file import DTYPES, TensorInfo, read_header, tensor_bytes

PIECE = 1 << 20
"""Bytes of each side that are held at once."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
    found = Difference()
    before, after = _tensors(first), _tensors(second)
    names = {old: new for old, new in (renamed or {}).items() if old in before and new in after}
    with ExitStack() as stack:
        files = _Files(stack)
        pairs = {**{name: name for name in before if name in after and name not in names.values()}, **names}
        for old, new in pairs.items():
            _compare(before[old], after[new], old, new, files, found)
        found.removed = [_one_side(name, before[name], 0) for name in before if name not in pairs]
        new_names = set(pairs.values())
        found.added = [_one_side(name, after[name], 1) for name in after if name not in new_names]
    found.bytes_compared = files.read
    _compare_configs(first.config, second.config, "", found)
    return found


def compare_files(first: Path, second: Path) -> Difference:
    """Compare two safetensors files, as :func:`compare` does.

    Raises:
        InputError: one of them is damaged.
    """
    found = Difference()
    before, after = read_header(first), read_header(second)
    with ExitStack() as stack:
        files = _Files(stack)
        for name in before.keys() & after.keys():
            _compare(_Stored(before[name]), _Stored(after[name]), name, name, files, found)
    found.removed = [_one_side(name, _Stored(before[name]), 0) for name in before if name not in after]
    found.added = [_one_side(name, _Stored(after[name]), 1) for name in after if name not in before]
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
class _Stored:
    """A tensor in a safetensors file."""

    info: TensorInfo

    @property
    def dtype(self) -> str:
        return self.info.dtype

    @property
    def shape(self) -> list[int]:
        return list(self.info.shape)

    @property
    def size(self) -> int:
        return self.info.end - self.info.start

    def bytes(self, start: int, size: int, files: _Files) -> bytearray | memoryview:
        return files.piece(self.info.file, self.info.start + start, size)


@dataclass(frozen=True)
class _Pickled:
    """A tensor of a ``.bin`` file, mapped into memory where its format allows."""

    tensor: torch.Tensor

    @property
    def dtype(self) -> str:
        return _NAMES[self.tensor.dtype]

    @property
    def shape(self) -> list[int]:
        return list(self.tensor.shape)

    @property
    def size(self) -> int:
        return self.tensor.nbytes

    def bytes(self, start: int, size: int, files: _Files) -> bytearray | memoryview:
        item = self.tensor.dtype.itemsize
        part = self.tensor.reshape(-1)[start // item : (start + size) // item]
        return bytearray(tensor_bytes(part))


_Tensor = _Stored | _Pickled


def _tensors(checkpoint: CheckpointFolder) -> dict[str, _Tensor]:
    if not checkpoint.is_bin:
        return {name: _Stored(info) for name, info in checkpoint.tensors.items()}
    loaded = (load_bin(checkpoint.path / name) for name in checkpoint.weight_files)
    return {name: _Pickled(tensor) for state in loaded for name, tensor in state.items()}


def _one_side(name: str, tensor: _Tensor, side: int) -> TensorChange:
    dtype, shape = (tensor.dtype, None), (tensor.shape, None)
    return TensorChange(name, dtype if side == 0 else dtype[::-1], shape if side == 0 else shape[::-1])


def _compare(before: _Tensor, after: _Tensor, old: str, new: str, files: _Files, found: Difference) -> None:
    was = old if old != new else None
    change = TensorChange(new, (before.dtype, after.dtype), (before.shape, after.shape), was=was)
    if before.shape != after.shape:
        found.changed.append(change)
        return
    if _one_place(before, after):
        same, elements, largest = True, None, None
    else:
        same, elements, largest = _contents(before, after, files)
    if not same:
        found.changed.append(TensorChange(new, change.dtype, change.shape, elements, largest, was))
    elif was is None:
        found.same += 1
    else:
        found.renamed[old] = new


def _one_place(before: _Tensor, after: _Tensor) -> bool:
    """Whether both are the same bytes of the same file, as hard links make them."""
    if not isinstance(before, _Stored) or not isinstance(after, _Stored) or before.info.start != after.info.start:
        return False
    return os.path.samestat(before.info.file.stat(), after.info.file.stat())


def _contents(before: _Tensor, after: _Tensor, files: _Files) -> tuple[bool, int | None, float | None]:
    """Whether dtype and bytes are equal; how many numbers differ, and by how much at most."""
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
