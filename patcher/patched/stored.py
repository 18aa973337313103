"""What a patched folder stores: the vectors that its tensors really hold, read back from the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.safetensors_file import read_tensor
from patcher.checkpoint.steering_files import ORIGINAL_PREFIX, RIGHT_PREFIX, SPREAD_PREFIX, VECTORS
from patcher.errors import InputError
from patcher.patched.route import Tensor
from patcher.patched.schema import Patch

_ROWS = 8192


@dataclass(frozen=True)
class StoredSlot:
    """One tensor that holds a layer's vector.

    Attributes:
        parameter: its name in the stock class that loads the folder.
        delta: [hidden]; what it holds over its neutral content (per unit of ``right``).
        gain: [hidden] or a number; residual gain per unit of ``delta``.
        rel_error: relative error of ``delta``, the worst row where several hold it.
        right: [n]; the tensor holds the outer product of ``delta`` and this ([experts, n]: of each expert and its
            own). None: ``delta`` itself.
        transposed: the outer product lies as [n, hidden].
        index: the expert of a fused parameter.
        original: [hidden, n] or [n, hidden]; what the base stores there, of a matrix that was rounded again.
    """

    parameter: str
    delta: torch.Tensor
    gain: torch.Tensor = field(default_factory=lambda: torch.ones(()))
    rel_error: float = 0.0
    right: torch.Tensor | None = None
    transposed: bool = False
    index: int | None = None
    original: torch.Tensor | None = None


@dataclass(frozen=True)
class StoredLayer:
    """One edited layer of a folder.

    Attributes:
        wanted: [hidden] fp32; the sum of the layer's edits, as the copy's residual stream should gain them.
        stored: [hidden] fp32; what it gains by the tensors in the file.
        rel_error: |stored - wanted| / |wanted|, of the worst tensor.
        slots: the tensors that hold it.
        copy_layer: the block of the copy after which the residual stream holds it.
    """

    wanted: torch.Tensor
    stored: torch.Tensor
    rel_error: float
    slots: tuple[StoredSlot, ...]
    copy_layer: int


def read_stored(folder: Path, patch: Patch, *, partial: bool = False) -> dict[int, StoredLayer]:
    """What the folder's files hold, layer by layer; of a ``partial`` one, those that are here have to hold it all.

    Raises:
        InputError: files are missing, damaged, or contradict the manifest.
    """
    path = folder / VECTORS
    try:
        vectors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError("the vectors cannot be read", where=str(path), found=error, remedy="build it again") from None
    checkpoint = CheckpointFolder(folder, partial=partial)
    route = patch.route
    wanted: dict[int, torch.Tensor] = {}
    try:
        for edit in patch.edits:
            layer, vector = edit.layer, vectors[edit.tensor]
            fits = vector.ndim == 1 and len(vector) and vector.is_floating_point()
            _require(fits and vector.shape == wanted.get(layer, vector).shape, f"{path}: {edit.tensor}", vector)
            wanted[layer] = wanted.get(layer, torch.zeros(())) + vector.double()
        if not wanted:
            raise KeyError("an edit")
        carriers: dict[int, list[Tensor]] = {layer: [] for layer in wanted}
        for tensor in route.tensors:
            carriers[tensor.layer].append(tensor)
        result = {}
        for layer, vector in wanted.items():
            if not carriers[layer]:
                raise KeyError(f"a tensor for layer {layer}")
            if route.centred:
                vector = vector - vector.mean()
            slots = [_slot(vector, tensor, checkpoint, vectors) for tensor in carriers[layer]]
            result[layer] = StoredLayer(
                wanted=vector.float(),
                stored=torch.stack([slot.delta.double() * slot.gain for slot in slots]).mean(dim=0).float(),
                rel_error=max(slot.rel_error for slot in slots),
                slots=tuple(slots),
                copy_layer=route.in_copy(layer),
            )
        return result
    except KeyError as error:
        raise InputError(
            "the manifest names a tensor that is not in the folder",
            where=str(folder),
            found=error,
            remedy="build it again",
        ) from None


def _slot(
    wanted: torch.Tensor, tensor: Tensor, checkpoint: CheckpointFolder, vectors: Mapping[str, torch.Tensor]
) -> StoredSlot:
    name = tensor.name
    now = read_tensor(checkpoint.tensors[name])
    added = tensor.kind == "added"
    before = vectors[ORIGINAL_PREFIX + name] if added else torch.tensor(tensor.offset or 0.0)
    where = f"{checkpoint.path}: {name}"
    gain = torch.tensor(tensor.factor, dtype=torch.float64)
    if tensor.spread:
        spread = vectors[SPREAD_PREFIX + name]
        _require(spread.shape in ((), wanted.shape), where, spread)
        gain = gain / spread.double()
    wanted = wanted / gain
    right, transposed = None, tensor.transposed
    if tensor.outer:
        right = vectors[RIGHT_PREFIX + name].double()
        shape = (right.shape[-1], *wanted.shape) if transposed else (*wanted.shape, right.shape[-1])
        _require(right.ndim in (1, 2) and now.numel() and now.shape[-2:] == shape, where, now)
        _require(right.ndim == 1 or now.shape[:-2] == right.shape[:-1], where, now)
        _require(before.shape in ((), now.shape), where, before)
        matrices = now.reshape(-1, *now.shape[-2:])
        rows = right.expand(len(matrices), -1)
        _require(right.any() and not matrices[~rows.any(dim=-1)].any(), where, now)
        # What was added to a half-precision weight is rounded beside it, at random; a created one holds it exactly.
        held = [
            _outer((matrix.T if transposed else matrix), row, wanted, exact=not added)
            for matrix, row in zip((part.double() - before.double() for part in matrices), rows, strict=True)
            if row.any()
        ]
        delta = torch.stack([found for found, _ in held]).mean(dim=0)
        error = torch.stack([off for _, off in held]).max()
    else:
        _require(now.ndim and now.numel() and now.shape[-1:] == wanted.shape, where, now)
        _require(before.shape in ((), wanted.shape, now.shape), where, before)
        delta, error = _rows(now.reshape(-1, now.shape[-1]), before, wanted)
    return StoredSlot(
        parameter=tensor.parameter or name,
        delta=delta.float(),
        gain=gain,
        rel_error=float(error.nan_to_num(float("inf"))),
        right=None if right is None else right.float(),
        transposed=transposed,
        index=tensor.index,
        original=before if added and right is not None else None,
    )


def _require(fits: object, where: str, tensor: torch.Tensor) -> None:
    if not fits:
        raise InputError(
            "a tensor is not what the manifest says",
            where=where,
            found=f"{tensor.dtype} {list(tensor.shape)}",
            remedy="build it again",
        )


def _outer(
    matrix: torch.Tensor, right: torch.Tensor, wanted: torch.Tensor, *, exact: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The left factor that a matrix [hidden, n] has beside ``right``, and its relative error; all of it if exact."""
    delta = matrix @ right / (right @ right)
    error = (delta - wanted).norm() / wanted.norm()
    if exact:
        error = torch.maximum(error, (matrix - torch.outer(delta, right)).norm() / (delta.norm() * right.norm()))
    return delta, error


def _rows(now: torch.Tensor, before: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of the rows' gains, and the largest relative error of one; a vocabulary's rows are taken in pieces."""
    before = before.expand(now.shape)
    total, worst = torch.zeros_like(wanted), torch.zeros((), dtype=torch.float64)
    for start in range(0, len(now), _ROWS):
        gains = now[start : start + _ROWS].double() - before[start : start + _ROWS].double()
        total += gains.sum(dim=0)
        worst = torch.maximum(worst, ((gains - wanted).norm(dim=-1) / wanted.norm()).max())
    return total / len(now), worst
