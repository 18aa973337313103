"""A copy taken back to its base, from the copy alone: the inverse of :func:`patcher.checkpoint.writer.write_copy`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from patcher.checkpoint.assembling import Piece, assemble, in_file_order, metadata_of, raw_header
from patcher.checkpoint.copying import place_file
from patcher.checkpoint.folder import INDEX, CheckpointFolder
from patcher.checkpoint.safetensors_file import DTYPES, TensorInfo, read_header, tensor_bytes
from patcher.checkpoint.undo import STOCK_METADATA, ZEROS_UP_TO, index_text
from patcher.errors import InputError

_STEP = 1 << 22
_TOKENIZER_CONFIG = "tokenizer_config.json"

Originals = Mapping[str, TensorInfo]
"""Tensor of the base -> its former values, in fp32."""


def restore(
    copy: CheckpointFolder,
    stage: Path,
    *,
    undo: Mapping[str, Any],
    renamed: Mapping[str, str],
    originals: Originals,
    link: bool = False,
) -> int:
    """Write what ``copy`` was made of into the empty folder ``stage``.

    Args:
        copy: a folder that the writer wrote; opened read-only.
        undo: the record that the writer made.
        renamed: tensor of the base -> of the copy.
        originals: where the values of overwritten tensors are kept.
        link: place weight files of which no byte changes as hard links.

    Returns:
        The bytes written.

    Raises:
        InputError: the folder no longer is what was written, or the record does not fit it.
    """
    try:
        return _restore(copy, stage, undo, renamed, originals, link)
    except (KeyError, TypeError, AttributeError, ValueError, StopIteration) as error:
        # Someone's hand in steering.json, or other files in the folder than those it speaks of.
        raise InputError(
            "the folder is not as it was written, so the base cannot be taken out of it",
            where=str(copy.path),
            found=f"{type(error).__name__}: {error}",
            remedy="give the base, whose files are then taken: --base PATH",
            code="undo",
        ) from None


def _restore(
    copy: CheckpointFolder,
    stage: Path,
    undo: Mapping[str, Any],
    renamed: Mapping[str, str],
    originals: Originals,
    link: bool,
) -> int:
    patched, back = set(undo["patched"]), {new: old for old, new in renamed.items()}
    in_copy = {renamed.get(name, name) for name in patched}
    written = 0
    for file in undo["files"]:
        source = None if file["copy"] is None else copy.path / _plain(file["copy"])
        target = stage / _plain(file["base"])
        if target.exists():
            raise ValueError(f"{target.name} is named twice")
        stored = {} if source is None else read_header(source)
        changed = sorted(in_copy & stored.keys())
        if file["rewritten"]:
            gone = [entry for entry in undo["left_out"] if entry["file"] == file["base"]]
            written += _reassemble(source, stored, target, file, gone, back, originals)
        else:
            assert source is not None
            written += place_file(source, target, link=link and not changed).written
        if changed:
            there = read_header(target)
            for name in changed:
                written += _write_back(target, there[back.get(name, name)], originals[back.get(name, name)])
    weight_map = {name: file["base"] for file in undo["files"] for name in read_header(stage / _plain(file["base"]))}
    index = undo["index"]
    texts = {"config.json": undo["config"]}
    if index is not None:
        texts[INDEX] = index["text"] if "text" in index else index_text(index["metadata"], weight_map)
    for side in copy.side_files(remote_code=True):
        if str(side) == _TOKENIZER_CONFIG and "tokenizer_config" in undo:
            if undo["tokenizer_config"] is not None:
                texts[_TOKENIZER_CONFIG] = undo["tokenizer_config"]
            continue
        (stage / side).parent.mkdir(parents=True, exist_ok=True)
        written += place_file(copy.path / side, stage / side).written
    for name, text in texts.items():
        raw = text.encode()
        (stage / name).write_bytes(raw)
        (stage / name).chmod(0o644)
        written += len(raw)
    return written


def _reassemble(
    source: Path | None,
    stored: Mapping[str, TensorInfo],
    target: Path,
    file: Mapping[str, Any],
    gone: list[Mapping[str, Any]],
    back: Mapping[str, str],
    originals: Originals,
) -> int:
    """A file of the base: what the copy keeps of it, with what it lacks put between."""
    kept = iter([Piece.of(info, back.get(info.name, info.name)) for info in in_file_order(stored.values())])
    lacking = sorted(gone, key=lambda entry: tuple(entry["data_offsets"]))
    pieces: list[Piece] = []
    place = 0
    for entry in lacking:
        start, end = entry["data_offsets"]
        while place < start:
            piece = next(kept)
            pieces.append(piece)
            place += piece.size
        if place != start:
            raise ValueError(f"there is no place for {entry['name']!r}")
        pieces.append(_made(entry, end - start, originals))
        place = end
    pieces += kept
    header = file["header"].encode() if "header" in file else None
    if header is not None:
        header = len(header).to_bytes(8, "little") + header
    metadata = STOCK_METADATA if source is None else metadata_of(raw_header(source))
    done = assemble(target, metadata, pieces, header=header, pad=False)
    there = {(info.name, info.dtype, info.shape, info.end - info.start) for info in read_header(target).values()}
    if there != {(piece.name, piece.dtype, tuple(piece.shape), piece.size) for piece in pieces}:
        raise ValueError(f"the header that is kept for {file['base']} is of other tensors")
    return done.size - done.shared


def _made(entry: Mapping[str, Any], size: int, originals: Originals) -> Piece:
    make: Callable[[], Iterator[memoryview | bytes]]
    if entry["content"] == "zeros":
        if size > ZEROS_UP_TO:
            raise ValueError(f"{size:,} zeros are more than a copy leaves out")

        def make() -> Iterator[memoryview | bytes]:
            yield bytes(size)
    else:
        info = originals[entry["name"]]

        def make() -> Iterator[memoryview | bytes]:
            return _values(info, DTYPES[entry["dtype"]], size)

    return Piece(entry["name"], entry["dtype"], entry["shape"], size, make=make)


def _write_back(target: Path, place: TensorInfo, original: TensorInfo) -> int:
    with target.open("r+b") as file:
        file.seek(place.start)
        for part in _values(original, DTYPES[place.dtype], place.end - place.start):
            file.write(part)
    return place.end - place.start


def _values(info: TensorInfo, dtype: torch.dtype, size: int) -> Iterator[memoryview]:
    """fp32 values in the dtype that they came from, in parts."""
    count = (info.end - info.start) // torch.float32.itemsize
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
