"""Checkpoints of the first blocks of a model, base and copy alike: what a stock stack can run of a partial download.

What comes after the blocks (the final norm, the LM head) is the same in both. Where it was not downloaded, ones and
seeded noise stand in for it, so that there are log-probabilities to compare.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from patcher.architectures.analysis import Architecture
from patcher.architectures.config_keys import BLOCK_COUNTS, block_count, stated
from patcher.architectures.decoder import decoder_part, with_changes
from patcher.architectures.model_class import on_meta, parameter_shapes
from patcher.checkpoint.block_names import BlockNames
from patcher.checkpoint.folder import INDEX, CheckpointFolder
from patcher.checkpoint.hub_folder import HubCheckpoint
from patcher.checkpoint.prepare import read_config
from patcher.checkpoint.safetensors_file import DTYPES, FLOATS, TensorInfo
from patcher.checkpoint.safetensors_writer import AnyTensor, LazyTensor, write_tensors
from patcher.checkpoint.writer import copy_tensors
from patcher.disk.json_files import read_json_object
from patcher.errors import InputError

STAND_INS = "stand-ins.safetensors"
_SPREAD = 0.02


class CannotTruncate(Exception):  # noqa: N818 - a finding, not a failure
    """The first blocks alone are no model of this class; the text says why."""


def blocks_here(base: HubCheckpoint, names: BlockNames, last_edit: int, total: int) -> int | None:
    """How many of the first blocks can be run: up to the last edit, or all where all are here; None for none."""
    if not base.absent:
        return total
    count = max(0, last_edit) + 1
    needed = (info for name, info in base.tensors.items() if names.is_needed(name, count - 1))
    return count if all(info.file.name in base.here for info in needed) else None


def truncated_folders(
    base: HubCheckpoint,
    copy: Path,
    absent: Mapping[str, str],
    architecture: Architecture,
    names: BlockNames,
    count: int,
    place: Path,
) -> tuple[Path, Path]:
    """Folders of the first ``count`` blocks of the base, and of the copy with what was inserted among them.

    Args:
        copy: the staged copy, without the weight files in ``absent`` (name in the copy -> in the base).
        place: where they are written; weights are links where a whole file is needed.

    Raises:
        CannotTruncate: a class under the shorter config is not the first part of the class.
    """
    of_base = {name: info for name, info in base.tensors.items() if info.file.name in base.here}
    of_copy = {name: info for name, info in of_base.items() if info.file.name in absent.values()}
    of_copy |= CheckpointFolder(copy, partial=True).tensors
    inserted = block_count(_parsed(copy)) - architecture.block_count
    stand_ins = {
        name: info
        for name, info in base.tensors.items()
        if info.file.name not in base.here and names.block_of(name) is None and not names.is_needed(name, count - 1)
    }
    place.mkdir(parents=True)
    shared = place / STAND_INS
    if stand_ins:
        write_tensors(shared, {name: _stand_in(info) for name, info in stand_ins.items()})
    made = []
    for name, folder, tensors, length in (
        ("base", base.path, of_base, count),
        ("copy", copy, of_copy, count + inserted),
    ):
        target = place / name
        target.mkdir()
        for item in folder.iterdir():
            if item.is_file() and item.name not in ("config.json", INDEX) and not _holds_weights(item.name):
                (target / item.name).symlink_to(item.resolve())
        _shorten(folder, target, architecture.blocks, length)
        kept = {key: info for key, info in tensors.items() if _is_first(key, names, length)}
        _write_weights(target, kept, tensors, shared if stand_ins else None, stand_ins)
        made.append(target)
    return made[0], made[1]


def _is_first(name: str, names: BlockNames, count: int) -> bool:
    index = names.block_of(name)
    return index is None or index < count


def _holds_weights(name: str) -> bool:
    return name.endswith(".safetensors") and not name.startswith("steering")


def _parsed(folder: Path) -> Any:
    try:
        return read_config(folder)
    except InputError as error:
        raise CannotTruncate(error.problems[0].found or error.problems[0].message) from None


def _shorten(folder: Path, target: Path, blocks: str, count: int) -> None:
    """Write the folder's config with ``count`` blocks, and see that its class is the first part of the folder's."""
    parsed, content = _parsed(folder), read_json_object(folder / "config.json")
    before = block_count(parsed)
    shorter = with_changes(content, {}, _shorter(decoder_part(content), parsed, before, count))
    (target / "config.json").write_text(json.dumps(shorter, indent=2), encoding="utf-8")
    try:
        short = parameter_shapes(on_meta(_parsed(target)))
        whole = parameter_shapes(on_meta(parsed))
    except InputError as error:
        raise CannotTruncate(error.problems[0].found or error.problems[0].message) from None
    later = tuple(f"{blocks}.{index}." for index in range(count, before))
    if short != {name: shape for name, shape in whole.items() if not name.startswith(later)}:
        raise CannotTruncate("the class has other parameters then")


def _shorter(content: Mapping[str, Any], parsed: Any, before: int, count: int) -> dict[str, Any]:
    if "per_layer_config" in content:
        raise CannotTruncate("its blocks have configs of their own")
    spellings: Mapping[str, str] = stated(parsed, "attribute_map") or {}
    changed = dict(content)
    changed[spellings.get("num_hidden_layers", "num_hidden_layers")] = count
    for key, value in content.items():
        if key in BLOCK_COUNTS and value == before:
            changed[key] = count
        elif isinstance(value, list) and len(value) == before and key != "architectures" and "token" not in key:
            changed[key] = value[:count]
    return changed


def _stand_in(info: TensorInfo) -> AnyTensor:
    if info.dtype not in FLOATS:
        raise CannotTruncate(f"`{info.name}` is stored as {info.dtype}")
    dtype = DTYPES[info.dtype]

    def make() -> torch.Tensor:
        if len(info.shape) < 2:
            return torch.full(info.shape, 0.0 if info.name.endswith("bias") else 1.0, dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        return torch.empty(info.shape, dtype=dtype).normal_(0.0, _SPREAD, generator=generator)

    return LazyTensor(dtype, info.shape, make)


def _write_weights(
    target: Path,
    kept: Mapping[str, TensorInfo],
    stored: Mapping[str, TensorInfo],
    shared: Path | None,
    stand_ins: Mapping[str, TensorInfo],
) -> None:
    """The kept tensors: links to files all of whose tensors are kept, copies of parts of the others; and an index."""
    weight_map: dict[str, str] = dict.fromkeys(stand_ins, STAND_INS)
    for number, file in enumerate(sorted({info.file for info in kept.values()})):
        # Under its own name, `model.safetensors` would be read alone, whatever the index says.
        part = target / f"part-{number}.safetensors"
        inside = [name for name, info in stored.items() if info.file == file]
        chosen = {name: name for name in inside if name in kept}
        if len(chosen) == len(inside):
            part.symlink_to(file.resolve())
        else:
            copy_tensors(file, part, chosen)
        weight_map |= dict.fromkeys(chosen, part.name)
    if shared is not None:
        (target / STAND_INS).symlink_to(shared.resolve())
    text = json.dumps({"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
    (target / INDEX).write_text(text, encoding="utf-8")
