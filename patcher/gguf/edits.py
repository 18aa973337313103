"""The vectors that go into a GGUF file: those of a patched folder, or one from a vector file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from patcher.architectures.config_keys import stated_block_count
from patcher.architectures.decoder import decoder_part
from patcher.checkpoint.steering_files import VECTORS
from patcher.disk.json_files import read_json_object
from patcher.errors import InputError
from patcher.patched.reading import read_manifest
from patcher.patched.route import RecordedRoute
from patcher.vectors.files.asked import Asked, SteeredModel
from patcher.vectors.files.reading import read_vector_file


@dataclass(frozen=True)
class GgufEdit:
    """One steering edit.

    Attributes:
        name: for people.
        layer: 0-based block after which the residual stream gains ``vector``.
        vector: fp32 [hidden], with coefficient and scale in it.
        coefficient: for the record.
        original: fp32 [hidden] or [experts, hidden]: what the unsteered checkpoint holds in the tensor that the
            patched folder added to; None where it had none.
        source: of one from a vector file, where in it; see
            :meth:`patcher.vectors.files.reading.VectorReading.as_json`.
        notes: what the user should know.
    """

    name: str
    layer: int
    vector: torch.Tensor
    coefficient: float
    original: torch.Tensor | None = None
    source: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "layer": self.layer,
            "coefficient": self.coefficient,
            "norm": float(self.vector.norm()),
            **({} if self.source is None else {"source": self.source}),
        }


def edits_of_folder(folder: Path, hidden: int, blocks: int) -> list[GgufEdit]:
    """The edits of a folder that patch-model wrote.

    Args:
        folder: the patched folder.
        hidden: the size of the GGUF model's residual stream.
        blocks: how many blocks the GGUF model has.

    Raises:
        InputError: it is no patched folder, is damaged, or is one of a model of another size.
    """
    patch = read_manifest(folder)
    _check_blocks(folder, patch.route, blocks)
    path = folder / VECTORS
    try:
        with safe_open(path, framework="pt") as file:
            originals = {
                tensor.layer: file.get_tensor(tensor.original).float()
                for tensor in patch.route.tensors
                if tensor.original and not tensor.outer and not tensor.transposed
            }
            return [
                _checked(
                    GgufEdit(
                        name=edit.name,
                        layer=edit.layer,
                        vector=file.get_tensor(edit.tensor).float(),
                        coefficient=edit.coefficient or 1.0,
                        original=originals.get(edit.layer),
                    ),
                    hidden,
                    f"{path}: {edit.tensor}",
                )
                for edit in patch.edits
            ]
    except (OSError, SafetensorError) as error:
        raise InputError("the vectors cannot be read", where=str(path), found=error, remedy="build it again") from None


def edit_of_file(path: Path, *, layer: int, model: SteeredModel, coefficient: float | None, asked: Asked) -> GgufEdit:
    """One vector of a file that :func:`patcher.vectors.files.reading.read_vector_file` reads, times the coefficient.

    Args:
        model: the GGUF model.
        coefficient: 1 where it is None.
        asked: which vector of the file.

    Raises:
        InputError: there is no such vector, it does not fit, or it is zero.
    """
    asked, factor = replace(asked, coefficient=coefficient), 1.0 if coefficient is None else coefficient
    found = read_vector_file(path, layer=layer, model=model, asked=asked)
    edit = GgufEdit(
        path.stem, layer, found.values * factor, factor, source=found.as_json(), notes=(found.words, *found.notes)
    )
    return _checked(edit, model.hidden, f"{path}, times {factor:g}")


def summed(edits: list[GgufEdit]) -> Mapping[int, torch.Tensor]:
    """Per block, the sum of the vectors: fp64 [hidden].

    Raises:
        InputError: they cancel out.
    """
    sums: dict[int, torch.Tensor] = {}
    for edit in edits:
        sums[edit.layer] = sums.get(edit.layer, torch.zeros(len(edit.vector), dtype=torch.float64)) + edit.vector
    for layer, vector in sums.items():
        if not float(vector.norm()) > 0:
            raise InputError("the vectors of a block cancel out", where=f"block {layer}", remedy="leave both out")
    return sums


def _check_blocks(folder: Path, route: RecordedRoute, blocks: int) -> None:
    """Refuse another model's GGUF file, as far as its depth tells."""
    if not (folder / "config.json").is_file():
        return
    config = decoder_part(read_json_object(folder / "config.json"))
    found = stated_block_count(config)
    if found is None:
        return
    found -= len(route.new_blocks)
    if found != blocks:
        raise InputError(
            "this is the GGUF file of another model: it has not as many blocks as the base of the patched folder",
            where=str(folder),
            found=f"{blocks} blocks instead of {found}",
            remedy="give the GGUF file of the base model",
        )


def _checked(edit: GgufEdit, hidden: int, where: str) -> GgufEdit:
    if edit.vector.ndim != 1 or len(edit.vector) != hidden:
        raise InputError(
            f"the vector does not fit this GGUF model, whose hidden size is {hidden}",
            where=where,
            found=f"shape {list(edit.vector.shape)}",
            remedy="give the GGUF file of the same model",
        )
    norm = float(edit.vector.norm())
    if not math.isfinite(norm) or norm == 0.0:
        raise InputError(
            "the vector is zero, or not finite", where=where, found=f"norm {norm}", remedy="use another coefficient"
        )
    return edit
