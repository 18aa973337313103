"""Where a GGUF model takes a constant: which tensor of a block, and what it must hold."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from patcher.checkpoint.gguf.file import read_floats
from patcher.checkpoint.gguf.format import F32, GgufTensor, gguf_error
from patcher.checkpoint.gguf.model import GgufModel
from patcher.errors import InputError
from patcher.gguf.relabel import Relabelling, unsupported

MAX_STORED_ERROR = 0.02


@cache
def rows() -> Mapping[str, Any]:
    """rows.json: per architecture of llama.cpp, what steers it."""
    loaded: Mapping[str, Any] = json.loads(Path(__file__).with_name("rows.json").read_text(encoding="utf-8"))
    return loaded


@dataclass(frozen=True)
class GgufSlot:
    """The tensor that steers a block.

    Attributes:
        name: its name in the copy.
        shape: as ggml counts: [hidden], or [hidden, experts].
        factor: what llama.cpp multiplies the tensor by on its way into the residual stream.
        existing: the tensor of the source, if there is one.
        required: whether the architecture always has it.
    """

    name: str
    shape: tuple[int, ...]
    factor: float
    existing: GgufTensor | None
    required: bool = False

    def before(self) -> torch.Tensor | None:
        """What the source holds, fp32 [hidden] or [experts, hidden]; None if it has no such tensor."""
        return None if self.existing is None else read_floats(self.existing)

    def values(self, vector: torch.Tensor) -> torch.Tensor:
        """What it must hold for the residual stream to gain ``vector`` [hidden]: fp32, shaped as in the file.

        Raises:
            InputError: fp32 cannot hold it beside what is there.
        """
        before = self.before()
        delta = vector.double() / self.factor
        stored = (delta if before is None else before.double() + delta).float()
        held = stored.double() if before is None else stored.double() - before.double()
        error = float((held - delta).norm(dim=-1).max() / delta.norm())
        if not error <= MAX_STORED_ERROR:
            raise InputError(
                "the tensor cannot hold the vector: what is there already is too large, or not finite",
                where=self.name if self.existing is None else f"{self.existing.file}: {self.name}",
                found=f"relative error {error:.2g}",
                remedy="use a larger coefficient, or another layer",
            )
        return stored


def relabelling(model: GgufModel) -> Relabelling | None:
    """How the model is renamed before it is steered; None if its own architecture takes a constant.

    Raises:
        InputError: llama.cpp has no place for one, neither under this name nor under another.
    """
    table = rows()
    if model.architecture in table["slots"]:
        return None
    if model.architecture in table["relabels"]:
        return Relabelling(model, table["relabels"][model.architecture], table["every_relabel"])
    why = table["refused"].get(model.architecture, "llama.cpp reads no output bias of its feed-forward blocks")
    raise unsupported(model, why, "general.architecture", model.architecture)


def slot(model: GgufModel, architecture: str, layer: int) -> GgufSlot:
    """Where block ``layer`` takes a constant, under the name of ``architecture`` (its own, or what it becomes).

    Raises:
        InputError: there is no such block, or it has no place for one.
    """
    row = rows()["slots"][architecture]
    hidden = check_layer(model, layer)
    name = f"blk.{layer}.{row['tensor']}"
    existing = model.tensors.get(name)
    weight = model.tensors.get(name.replace(".bias", ".weight"))
    if weight is None or len(weight.shape) < 2 or weight.shape[1] != hidden:
        # Mixtures of experts, attention-only blocks and state-space blocks of architectures that also have dense ones.
        shown = None if weight is None else f"{weight.name} {list(weight.shape)}"
        why = "this block has no dense feed-forward part, and an unused bias would be ignored or refused"
        raise unsupported(model, why, f"blk.{layer}", shown)
    for scaled in (name.replace(".bias", ".scale"), name.replace(".bias", ".input_scale")):
        if scaled in model.tensors:
            raise unsupported(model, "llama.cpp multiplies the output of this weight by a scale", scaled)
    shape: tuple[int, ...] = (hidden, weight.shape[2]) if row.get("experts") else (hidden,)
    if existing is None and row.get("required"):
        raise gguf_error("a tensor that this architecture always has is missing", model.first.path, name)
    if existing is not None and (existing.shape != shape or existing.type != F32):
        found = f"{existing.type_name} {list(existing.shape)} instead of F32 {list(shape)}"
        raise gguf_error("the bias that is there is not one that llama.cpp takes", existing.file, name, found)
    return GgufSlot(name, shape, _factor(model, row), existing, bool(row.get("required")))


def check_layer(model: GgufModel, layer: int) -> int:
    """The residual stream's size, if the model has block ``layer``.

    Raises:
        InputError: it has not.
    """
    count = block_count(model)
    if not 0 <= layer < count:
        embedding = layer == -1
        raise InputError(
            "the vector acts on the embedding, which a bias of a block cannot do"
            if embedding
            else f"there is no block {layer} in this model",
            where=str(model.first.path),
            found=f"blocks 0 to {count - 1}",
            remedy="convert the patched folder itself with llama.cpp's convert_hf_to_gguf.py"
            if embedding
            else "is this the GGUF file of the same model?",
        )
    return model.number("embedding_length")


def block_count(model: GgufModel) -> int:
    """How many blocks the residual stream passes through.

    Raises:
        InputError: the file does not say.
    """
    # Blocks that predict further tokens come last, and are no part of the plain forward pass.
    ahead = model.scalar("nextn_predict_layers")
    return model.number("block_count") - (ahead if isinstance(ahead, int) else 0)


def _factor(model: GgufModel, row: Mapping[str, Any]) -> float:
    scale = row.get("scale")
    if scale is None:
        return 1.0
    found = model.scalar(scale["key"])
    if found is None and "over_sqrt_blocks" in scale:
        return float(scale["over_sqrt_blocks"] / math.sqrt(block_count(model)))
    if found is None or found == 0:
        return 1.0  # as llama.cpp does
    if isinstance(found, (str, bool)) or not math.isfinite(found):
        place = f"{model.architecture}.{scale['key']}"
        raise gguf_error("the residual scale is not a number", model.first.path, place, found)
    return float(found)
