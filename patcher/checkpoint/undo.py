"""What is noted while a copy is written so that it can be taken back, bit for bit, from the copy alone.

The record is the manifest's ``undo``; :mod:`patcher.checkpoint.restoring` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from patcher.checkpoint.assembling import Piece, canonical_header, in_file_order, metadata_of, raw_header
from patcher.checkpoint.folder import INDEX, CheckpointFolder
from patcher.checkpoint.safetensors_file import FLOATS, TensorInfo

ZEROS_UP_TO = 1 << 20
STOCK_METADATA = {"format": "pt"}


def undo_record(
    base: CheckpointFolder,
    *,
    names: Mapping[str, str],
    rewritten: Collection[str],
    left_out: Collection[str],
    originals: Collection[str],
    tokenizer_config: Path | None,
) -> dict[str, Any]:
    """The record of one copy.

    Args:
        base: what is copied.
        names: weight file of the base -> of the copy.
        rewritten: files of the base that are not copied whole.
        left_out: tensors of the base that their file in the copy lacks.
        originals: tensors whose values ``steering.safetensors`` keeps, in fp32.
        tokenizer_config: of the base, if the copy's is changed.

    Returns:
        ``config`` and ``tokenizer_config`` (null: there is none): texts. ``index``: null, or what
        :func:`index_text` needs. ``files``: [{base, copy (null: nothing of it is left), rewritten, header (its
        text, where the stock writer would write another)}]. ``patched``: names of the tensors whose bytes were
        replaced in place. ``left_out``: [{name, file, dtype, shape, data_offsets, content: original | zeros}].
        Or only ``lost``: names of tensors whose values are kept nowhere, so that it takes the base to get them back.
    """
    kept = _exact(base, originals)
    begins: dict[str, int] = {}
    for info in base.tensors.values():
        begins[info.file.name] = min(info.start, begins.get(info.file.name, info.start))
    entries = [_left_out(base.tensors[name], begins, kept) for name in sorted(left_out)]
    lost = {entry["name"] for entry in entries if entry["content"] is None} | (set(originals) - set(kept))
    if lost:
        return {"lost": sorted(lost)}
    files = []
    for file in base.weight_files:
        entry: dict[str, Any] = {"base": file, "copy": names.get(file), "rewritten": file in rewritten}
        if file in rewritten:
            header = raw_header(base.path / file)
            pieces = [Piece.of(info, info.name) for info in in_file_order(_of_file(base, file))]
            # Nothing of a file that is gone could say what its metadata was.
            metadata = metadata_of(header) if file in names else STOCK_METADATA
            if canonical_header(metadata, pieces) != header:
                entry["header"] = header[8:].decode("utf-8")
        files.append(entry)
    record: dict[str, Any] = {
        "config": _text(base.path / "config.json"),
        "index": _index(base),
        "files": files,
        "patched": sorted(set(originals) - set(left_out)),
        "left_out": entries,
    }
    if tokenizer_config is not None:
        record["tokenizer_config"] = _text(tokenizer_config) if tokenizer_config.is_file() else None
    return record


def index_text(metadata: Any, weight_map: Mapping[str, str]) -> str:
    """An index as ``save_pretrained`` writes it."""
    return json.dumps({"metadata": metadata, "weight_map": dict(weight_map)}, indent=2, sort_keys=True) + "\n"


def _index(base: CheckpointFolder) -> dict[str, Any] | None:
    if not (base.path / INDEX).is_file():
        return None
    text = _text(base.path / INDEX)
    metadata = json.loads(text).get("metadata") if base.layout == "sharded" else None
    weight_map = {name: info.file.name for name, info in base.tensors.items()}
    return {"metadata": metadata} if index_text(metadata, weight_map) == text else {"text": text}


def _left_out(info: TensorInfo, begins: Mapping[str, int], kept: Collection[str]) -> dict[str, Any]:
    first = begins[info.file.name]
    content = "original" if info.name in kept else "zeros" if _is_zeros(info) else None
    return {
        "name": info.name,
        "file": info.file.name,
        "dtype": info.dtype,
        "shape": list(info.shape),
        "data_offsets": [info.start - first, info.end - first],
        "content": content,
    }


def _exact(base: CheckpointFolder, names: Collection[str]) -> list[str]:
    """Those whose values fp32 holds exactly."""
    return [name for name in names if base.tensors[name].dtype in FLOATS and base.tensors[name].dtype != "F64"]


def _is_zeros(info: TensorInfo) -> bool:
    """Only small ones are looked at: what a copy replaces by its own is a bias."""
    size = info.end - info.start
    if size > ZEROS_UP_TO:
        return False
    with info.file.open("rb") as file:
        file.seek(info.start)
        return not any(file.read(size))


def _of_file(base: CheckpointFolder, file: str) -> list[TensorInfo]:
    return [info for info in base.tensors.values() if info.file.name == file]


def _text(path: Path) -> str:
    # Not read_text, which would change the ends of lines.
    return path.read_bytes().decode("utf-8")
