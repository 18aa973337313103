"""A plan is carried out: the tensors that it writes for the vectors, the copy, and what is kept beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.safetensors_file import DTYPES, read_tensor
from patcher.checkpoint.safetensors_writer import LazyTensor
from patcher.checkpoint.steering_files import ORIGINAL_PREFIX, RIGHT_PREFIX, SPREAD_PREFIX, VECTORS, tensor_key
from patcher.checkpoint.writer import Written, write_copy
from patcher.errors import CheckFailed
from patcher.routes.plan import STORED_LIMIT, Plan, TensorWrite
from patcher.vectors.files.saving import save_vectors
from patcher.vectors.steering_vector import SteeringVector, sum_by_layer

_EAGER = 1 << 16
"""Zeros of more elements than this are made when they are written."""


def write_plan(
    plan: Plan,
    vectors: Sequence[SteeringVector],
    base: CheckpointFolder,
    stage: Path,
    *,
    link: bool = False,
    remote_code: bool = False,
    absent: Collection[str] = (),
) -> Written:
    """Write the steered copy of ``base`` into ``stage``, and ``steering.safetensors`` beside it.

    That file holds every vector. It also holds what is needed to verify the copy and to take the steering out again:
    the values that were overwritten, and the other factors of the products that hold a vector.

    Args:
        link, remote_code, absent: see :func:`patcher.checkpoint.writer.write_copy`.

    Raises:
        CheckFailed: see :func:`tensors_to_write`.
        OutsideError: the disk failed.
    """
    created, replaced = tensors_to_write(plan, sum_by_layer(vectors), base)
    written = write_copy(
        base,
        stage,
        created=created,
        replaced=replaced,
        config_changes=plan.config_changes,
        dropped=plan.dropped,
        renamed=plan.renamed,
        grown=plan.grown,
        config=plan.config,
        tokenizer_changes=plan.tokenizer_changes,
        link=link,
        remote_code=remote_code,
        absent=absent,
    )
    kept = {tensor_key(vector.name, vector.layer): vector.values for vector in vectors}
    kept |= {ORIGINAL_PREFIX + name: tensor for name, tensor in written.originals.items()}
    kept |= {RIGHT_PREFIX + write.name: write.right for write in plan.carriers if write.right is not None}
    kept |= {SPREAD_PREFIX + write.name: write.spread for write in plan.carriers if write.spread is not None}
    save_vectors(stage / VECTORS, kept, {"format": "pt", "tool": "patch-model"})
    return replace(written, bytes_written=written.bytes_written + (stage / VECTORS).stat().st_size)


def tensors_to_write(
    plan: Plan, vectors: Mapping[int, torch.Tensor], base: CheckpointFolder
) -> tuple[dict[str, torch.Tensor | LazyTensor], dict[str, torch.Tensor]]:
    """What the plan writes for ``vectors`` (layer -> [hidden] fp32).

    Returns:
        The created tensors and the replaced ones, by name on disk. What exists is added to in fp32 and rounded once
        to its stored dtype; what is derived from the base is made when it is written.

    Raises:
        CheckFailed: a stored half-precision bias is so large beside the vector that it cannot hold it.
    """
    created: dict[str, torch.Tensor | LazyTensor] = {}
    replaced: dict[str, torch.Tensor] = {}
    for write in plan.tensors:
        if write.layer is None:
            created[write.name] = _constant(write, base)
            continue
        vector = plan.in_copy(vectors[write.layer])
        if write.kind == "created":
            created[write.name] = _carrier(write, vector)
        else:
            slot = slot_content(write, vector)
            before = read_tensor(base.tensors[write.name])
            after = (before.float() + slot).to(DTYPES[write.dtype])
            if write.right is None:
                _require_held(write, before, after, slot)
            replaced[write.name] = after
    return created, replaced


def slot_content(write: TensorWrite, vector: torch.Tensor) -> torch.Tensor:
    """What a carrier gains for ``vector`` ([hidden] fp32), in the carrier's shape, fp32."""
    scaled = vector if write.spread is None else vector * write.spread
    slot = (scaled.double() / write.factor).float()
    if write.right is None:
        return slot.expand(write.shape)
    outer = write.right.float().unsqueeze(-2) * slot.unsqueeze(-1)
    return (outer.mT if write.transposed else outer).expand(write.shape)


def _carrier(write: TensorWrite, vector: torch.Tensor) -> torch.Tensor | LazyTensor:
    """What a created tensor holds for a vector; where there are many experts, only one lies in memory at a time."""
    dtype = DTYPES[write.dtype]

    def content() -> torch.Tensor:
        return (slot_content(write, vector) + write.offset).to(dtype).contiguous()

    large = math.prod(write.shape) > _EAGER and write.right is not None
    return LazyTensor(dtype, write.shape, content) if large else content()


def _constant(write: TensorWrite, base: CheckpointFolder) -> torch.Tensor | LazyTensor:
    dtype, make = DTYPES[write.dtype], write.make
    if make is None and math.prod(write.shape) <= _EAGER:
        return torch.zeros(write.shape, dtype=dtype)

    def content() -> torch.Tensor:
        if make is None:
            return torch.zeros(write.shape, dtype=dtype)
        return make(reader(base)).to(dtype)

    return LazyTensor(dtype, write.shape, content)


def reader(base: CheckpointFolder) -> Callable[[str], torch.Tensor]:
    """Reads tensors of ``base`` by their names on disk."""
    return lambda name: read_tensor(base.tensors[name])


def _require_held(write: TensorWrite, before: torch.Tensor, after: torch.Tensor, slot: torch.Tensor) -> None:
    width = slot.shape[-1]
    gained = (after.double() - before.double()).reshape(-1, width)
    wanted = slot.double().reshape(-1, width)
    error = float(((gained - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())
    if not error <= STORED_LIMIT:
        bias_norm, vector_norm = float(before.float().norm(dim=-1).max()), float(wanted[0].norm())
        raise CheckFailed(
            f"the stored bias cannot hold the vector: in {write.dtype} it would be off by {error:.1%}",
            where=f"layer {write.layer}: {write.name}",
            found=f"a bias of norm {bias_norm:.3g} beside a vector of norm {vector_norm:.3g}",
            remedy="use a larger coefficient, another layer, or a base saved in float32",
            code="half_precision",
        )
