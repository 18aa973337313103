"""What is noted while a copy is written, and how it is taken back by it: bit for bit, from the copy alone.

The record is the manifest's ``undo``.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from patcher.checkpoint.copying import place_file, read_range
from patcher.checkpoint.folder import INDEX, CheckpointFolder
from patcher.checkpoint.pieces import Made
from patcher.checkpoint.safetensors_file import (
    DTYPES,
    FLOATS,
    PREFIX,
    TensorInfo,
    in_file_order,
    metadata_of,
    raw_header,
    read_header,
    tensor_bytes,
)
from patcher.checkpoint.safetensors_writer import NewTensor, assemble, canonical_header, with_prefix
from patcher.checkpoint.slices import SliceOrder
from patcher.errors import InputError

_ZEROS_UP_TO = 1 << 20
_STOCK_METADATA = {"format": "pt"}
_STEP = 1 << 22
_TOKENIZER_CONFIG = "tokenizer_config.json"

Originals = Mapping[str, TensorInfo]
"""Tensor of the base -> its former values, in fp32."""


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
        :func:`restore` needs. ``files``: [{base, copy (null: nothing of it is left), rewritten, header (its
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
            here = in_file_order(info for info in base.tensors.values() if info.file.name == file)
            tensors = [NewTensor.of(info, info.name) for info in here]
            # Nothing of a file that is gone could say what its metadata was.
            metadata = metadata_of(header) if file in names else _STOCK_METADATA
            if canonical_header(metadata, tensors) != header:
                entry["header"] = header[PREFIX:].decode("utf-8")
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


def _index(base: CheckpointFolder) -> dict[str, Any] | None:
    if not (base.path / INDEX).is_file():
        return None
    text = _text(base.path / INDEX)
    metadata = json.loads(text).get("metadata") if base.layout == "sharded" else None
    weight_map = {name: info.file.name for name, info in base.tensors.items()}
    return {"metadata": metadata} if _index_text(metadata, weight_map) == text else {"text": text}


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
    return info.size <= _ZEROS_UP_TO and not any(read_range(info.file, info.start, info.size))


def _text(path: Path) -> str:
    # Not read_text, which would change the ends of lines.
    return path.read_bytes().decode("utf-8")


def _index_text(metadata: Any, weight_map: Mapping[str, str]) -> str:
    """An index as ``save_pretrained`` writes it."""
    return json.dumps({"metadata": metadata, "weight_map": dict(weight_map)}, indent=2, sort_keys=True) + "\n"


def restore(
    copy: CheckpointFolder,
    stage: Path,
    *,
    undo: Mapping[str, Any],
    renamed: Mapping[str, str],
    originals: Originals,
    grown: Mapping[str, SliceOrder] | None = None,
    link: bool = False,
) -> int:
    """Write what ``copy`` was made of into the empty folder ``stage``: the inverse of ``write_copy``.

    Args:
        copy: a folder that the writer wrote; opened read-only.
        undo: the record that the writer made.
        renamed: tensor of the base -> of the copy.
        originals: where the values of overwritten tensors are kept.
        grown: tensor of the base -> the order of the slices that it has in the copy.
        link: place weight files of which no byte changes as hard links.

    Returns:
        The bytes written.

    Raises:
        InputError: the folder no longer is what was written, or the record does not fit it.
    """
    with _as_it_was_written(copy.path):
        back = {new: old for old, new in renamed.items()}
        orders = {renamed.get(name, name): order.back for name, order in (grown or {}).items()}
        in_copy = {renamed.get(name, name) for name in undo["patched"]}
        written = 0
        for file in undo["files"]:
            source = None if file["copy"] is None else copy.path / _plain(file["copy"])
            target = stage / _plain(file["base"])
            if target.exists():
                raise ValueError(f"{target.name} is named twice")
            stored = {} if source is None else read_header(source)
            changed = sorted(in_copy & stored.keys())
            if file["rewritten"]:
                kept = [
                    orders[info.name].on_disk(info, back.get(info.name, info.name))
                    if info.name in orders
                    else NewTensor.of(info, back.get(info.name, info.name))
                    for info in in_file_order(stored.values())
                ]
                gone = [_made(entry, originals) for entry in undo["left_out"] if entry["file"] == file["base"]]
                written += _reassemble(source, target, file, kept, gone)
            else:
                assert source is not None
                written += place_file(source, target, link=link and not changed).written
            if changed:
                there = read_header(target)
                for name in changed:
                    written += _write_back(target, there[back.get(name, name)], originals[back.get(name, name)])
        weight_map = {
            name: file["base"] for file in undo["files"] for name in read_header(stage / _plain(file["base"]))
        }
        index, texts = undo["index"], {"config.json": undo["config"]}
        if index is not None:
            texts[INDEX] = index["text"] if "text" in index else _index_text(index["metadata"], weight_map)
        for side in copy.side_files(remote_code=True):
            if str(side) != _TOKENIZER_CONFIG or "tokenizer_config" not in undo:
                written += place_file(copy.path / side, stage / side).written
            elif undo["tokenizer_config"] is not None:
                texts[_TOKENIZER_CONFIG] = undo["tokenizer_config"]
        for name, text in texts.items():
            written += (stage / name).write_bytes(text.encode())
            (stage / name).chmod(0o644)
        return written


@contextmanager
def _as_it_was_written(folder: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, StopIteration) as error:
        # Someone's hand in steering.json, or other files in the folder than those it speaks of.
        message = "the folder is not as it was written, so the base cannot be taken out of it"
        found, remedy = f"{type(error).__name__}: {error}", "give the base, whose files are then taken: --base PATH"
        raise InputError(message, where=str(folder), found=found, remedy=remedy, code="undo") from None


def _reassemble(
    source: Path | None,
    target: Path,
    file: Mapping[str, Any],
    kept: list[NewTensor],
    gone: list[tuple[int, int, NewTensor]],
) -> int:
    """A file of the base: what the copy keeps of it, with what it lacks put between."""
    tensors: list[NewTensor] = []
    place, rest = 0, iter(kept)
    for start, end, lacking in sorted(gone, key=lambda item: item[:2]):
        while place < start:
            tensors.append(next(rest))
            place += tensors[-1].content.size
        if place != start:
            raise ValueError(f"there is no place for {lacking.name!r}")
        tensors.append(lacking)
        place = end
    tensors += rest
    header = with_prefix(file["header"].encode()) if "header" in file else None
    metadata = _STOCK_METADATA if source is None else metadata_of(raw_header(source))
    done = assemble(target, metadata, tensors, header=header, pad=False)
    there = {(info.name, info.dtype, info.shape, info.size) for info in read_header(target).values()}
    if there != {(tensor.name, tensor.dtype, tuple(tensor.shape), tensor.content.size) for tensor in tensors}:
        raise ValueError(f"the header that is kept for {file['base']} is of other tensors")
    return done.size - done.reflinked


def _made(entry: Mapping[str, Any], originals: Originals) -> tuple[int, int, NewTensor]:
    """A tensor that the copy lacks, after where its bytes begin and end."""
    start, end = entry["data_offsets"]
    size = end - start
    if entry["content"] == "zeros":
        if size > _ZEROS_UP_TO:
            raise ValueError(f"{size:,} zeros are more than a copy leaves out")
        content = Made(size, lambda: [bytes(size)])
    else:
        content = Made(size, partial(_values, originals[entry["name"]], DTYPES[entry["dtype"]], size))
    return start, end, NewTensor(entry["name"], entry["dtype"], entry["shape"], content)


def _write_back(target: Path, place: TensorInfo, original: TensorInfo) -> int:
    with target.open("r+b") as file:
        file.seek(place.start)
        for part in _values(original, DTYPES[place.dtype], place.size):
            file.write(part)
    return place.size


def _values(info: TensorInfo, dtype: torch.dtype, size: int) -> Iterator[memoryview]:
    """fp32 values in the dtype that they came from, in parts."""
    count = info.size // torch.float32.itemsize
    if info.dtype != "F32" or count * dtype.itemsize != size:
        raise ValueError(f"{info.name!r} is kept as {info.dtype} {list(info.shape)}")
    with info.file.open("rb") as file:
        file.seek(info.start)
        while count:
            part = bytearray(file.read(min(_STEP, count) * torch.float32.itemsize))
            if not part:
                raise ValueError(f"{info.file.name} is truncated")
            count -= len(part) // torch.float32.itemsize
            yield tensor_bytes(torch.frombuffer(part, dtype=torch.float32).to(dtype))


def _plain(name: str) -> str:
    """A file's name, which leads nowhere else."""
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise ValueError(f"{name!r} is no weight file")
    return name
