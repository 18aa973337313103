"""Write the steered copy: unchanged bytes are copied, a stored bias is patched in place, a new one gets a shard."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch

from patcher.architectures.decoder import with_changes
from patcher.checkpoint.copying import Placed, place_file
from patcher.checkpoint.folder import INDEX, SINGLE, CheckpointFolder
from patcher.checkpoint.safetensors_file import (
    DTYPES,
    TensorInfo,
    in_file_order,
    metadata_of,
    raw_header,
    read_header,
    read_tensor,
    tensor_bytes,
)
from patcher.checkpoint.safetensors_writer import LazyTensor, NewTensor, assemble, split_into_shards, write_tensors
from patcher.checkpoint.slices import SliceOrder
from patcher.checkpoint.undo import undo_record
from patcher.disk.json_files import read_json_object

_NUMBERED = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
UNNUMBERED_SHARD = "model-steering.safetensors"
TOKENIZER_CONFIG = "tokenizer_config.json"
MAX_SHARD = 5 * 10**9
"""Bytes of new tensors in one shard."""


@dataclass(frozen=True)
class Written:
    """What the writer did.

    Attributes:
        bytes_written: to the disk; what is linked or reflinked is not.
        originals: tensor -> the values that stood where it was overwritten.
        placed: what was done with the base's files and the new ones: ``files`` {way: {count, bytes}}, ``patched``
            {count, bytes} and ``not_linked`` (null, or why files were copied although links were asked for). Ways are
            those of :class:`~patcher.checkpoint.copying.Placed`, ``rewritten`` (another header) and ``new``.
        undo: see :func:`~patcher.checkpoint.undo.undo_record`.
        absent: name in the copy -> in the base, of the base's files that are not here.
    """

    bytes_written: int
    originals: Mapping[str, torch.Tensor]
    placed: Mapping[str, Any]
    undo: Mapping[str, Any]
    absent: Mapping[str, str] = field(default_factory=dict)


def write_copy(
    base: CheckpointFolder,
    stage: Path,
    *,
    created: Mapping[str, torch.Tensor | LazyTensor],
    replaced: Mapping[str, torch.Tensor],
    config_changes: Mapping[str, Any],
    dropped: Collection[str] = (),
    renamed: Mapping[str, str] | None = None,
    grown: Mapping[str, SliceOrder] | None = None,
    config: Mapping[str, Any] | None = None,
    tokenizer_changes: Mapping[str, Any] | None = None,
    remote_code: bool = False,
    link: bool = False,
    absent: Collection[str] = (),
) -> Written:
    """Write a copy of ``base`` into the empty folder ``stage``.

    Args:
        base: a safetensors checkpoint; opened read-only.
        created: tensors that the base does not store, by name on disk; a lazy one is made when it is written.
        replaced: tensors that the base stores, in the stored shape: patched byte for byte in the stored dtype, or, in
            fp32 where half precision is stored, left out of their shard and written beside ``created``.
        config_changes: keys of the decoder in config.json; None removes one.
        dropped: tensors of the base that the copy lacks; ``created`` may use their names again.
        renamed: tensors of the base under another name in the copy; their bytes are copied.
        grown: tensors of the base that have more slices in the copy.
        config: all keys of the decoder in config.json, instead of the base's with changes.
        tokenizer_changes: keys of tokenizer_config.json.
        remote_code: take the checkpoint's own .py files along.
        link: place weight files of which no byte changes as hard links, where that can be done. They are then the
            base's own files: whoever writes to one in the copy writes to the base.
        absent: weight files of the base that are not here, none of which may change: they are named in the index, and
            whoever publishes the copy lets the Hub copy them.
    """
    widened = {
        name
        for name, tensor in replaced.items()
        if tensor.dtype == torch.float32 and base.tensors[name].dtype in ("F16", "BF16")
    }
    layout = _Layout(base, widened.union(dropped), renamed or {}, grown or {})
    added = {**created, **{layout.new_name(name): replaced[name] for name in widened}}
    if twice := added.keys() & layout.kept.values():
        raise ValueError(f"created, but stored already: {sorted(twice)}")
    shards = split_into_shards(added, MAX_SHARD)
    names = _new_names(layout.files, adds=len(shards))
    patched = {base.tensors[name].file.name for name in replaced if name not in widened}
    log = _Log()
    for source, target in names.items():
        if source in absent:
            if source in patched or not layout.is_unchanged(source):
                raise ValueError(f"{source} changes, and is not here")
        elif layout.is_unchanged(source):
            log.placed(place_file(base.path / source, stage / target, link=link and source not in patched))
        else:
            log.add("rewritten", *copy_tensors(base.path / source, stage / target, layout.kept, layout.grown))
    originals = {}
    for name, tensor in replaced.items():
        info = base.tensors[name]
        originals[name] = read_tensor(info)
        if name not in widened:
            target = names[info.file.name]
            place = info if layout.is_unchanged(info.file.name) else read_header(stage / target)[layout.new_name(name)]
            log.add("patched", _patch(stage / target, place, tensor))
    shard_names = _shard_names(names, len(shards))
    weight_map = {new: names[base.tensors[old].file.name] for old, new in layout.kept.items()}
    for shard, content in zip(shard_names, shards, strict=True):
        log.add("new", write_tensors(stage / shard, content))
        weight_map.update(dict.fromkeys(content, shard))
    # A single file gets one too: without an index vLLM and SGLang load every *.safetensors, our vectors as well.
    index = {"metadata": _index_metadata(base, layout, added), "weight_map": dict(sorted(weight_map.items()))}
    log.add("new", _write_json(stage / INDEX, index))
    changed = with_changes(base.config, config_changes, config)
    if not remote_code:
        # Code from elsewhere may not know the bias; without this key every loader takes the stock class.
        changed.pop("auto_map", None)
    log.add("new", _write_json(stage / "config.json", changed))
    for side in base.side_files(remote_code=remote_code):
        log.placed(place_file(base.path / side, stage / side))
    stated = base.path / TOKENIZER_CONFIG
    if tokenizer_changes:
        before = read_json_object(stated) if stated.is_file() else {}
        log.add("new", _write_json(stage / TOKENIZER_CONFIG, {**before, **tokenizer_changes}))
    undo = undo_record(
        base,
        names=names,
        rewritten=[name for name in base.weight_files if not layout.is_unchanged(name)],
        left_out=layout.gone,
        originals=originals,
        tokenizer_config=stated if tokenizer_changes else None,
    )
    elsewhere = {target: source for source, target in names.items() if source in absent}
    return Written(log.bytes_written, originals, log.as_json(), undo, elsewhere)


class _Log:
    """Counts files and bytes by the way in which they came to be."""

    def __init__(self) -> None:
        self.bytes_written = 0
        self._files: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._not_linked: str | None = None

    def placed(self, file: Placed) -> None:
        self.add(file.how, file.size, file.written)
        self._not_linked = self._not_linked or file.not_linked

    def add(self, way: str, size: int, written: int | None = None) -> None:
        """A file of ``size`` bytes, of which ``written`` (None: all) were written to the disk."""
        self._files[way] += 1
        self._bytes[way] += size
        self.bytes_written += size if written is None else written

    def as_json(self) -> dict[str, Any]:
        counted = {way: {"count": self._files[way], "bytes": self._bytes[way]} for way in self._files}
        patched = counted.pop("patched", {"count": 0, "bytes": 0})
        return {"files": counted, "patched": patched, "not_linked": self._not_linked}


class _Layout:
    """Which of the base's tensors travel, under which names, and which of its files are copied as they are."""

    def __init__(
        self,
        base: CheckpointFolder,
        gone: Collection[str],
        renamed: Mapping[str, str],
        grown: Mapping[str, SliceOrder],
    ) -> None:
        self.renamed, self.grown = renamed, grown
        self.gone = [name for name in base.tensors if name in gone]
        self.kept = {name: renamed.get(name, name) for name in base.tensors if name not in gone}
        """Name in the base -> in the copy."""
        if len(set(self.kept.values())) < len(self.kept):
            raise ValueError("two tensors of the base would have one name in the copy")
        self._changed = {
            info.file.name for name, info in base.tensors.items() if self.kept.get(name) != name or name in grown
        }
        filled = {base.tensors[name].file.name for name in self.kept}
        self.files = [name for name in base.weight_files if name in filled or name not in self._changed]

    def new_name(self, name: str) -> str:
        return self.renamed.get(name, name)

    def is_unchanged(self, file: str) -> bool:
        return file not in self._changed


def copy_tensors(
    source: Path, target: Path, names: Mapping[str, str], grown: Mapping[str, SliceOrder] | None = None
) -> tuple[int, int]:
    """Copy those tensors of a safetensors file that ``names`` lists (old name -> new), byte for byte.

    Those of ``grown`` are copied slice by slice.

    Two shards that hold one key are read differently by different loaders, so what is left out really goes.

    Returns:
        The new file's size, and how many of its bytes were written (others are shared with ``source``).
    """
    kept = [info for info in in_file_order(read_header(source).values()) if info.name in names]
    order = grown or {}
    tensors = [
        order[info.name].on_disk(info, names[info.name]) if info.name in order else NewTensor.of(info, names[info.name])
        for info in kept
    ]
    done = assemble(target, metadata_of(raw_header(source)), tensors)
    return done.size, done.size - done.reflinked


def _new_names(files: list[str], *, adds: int) -> dict[str, str]:
    if not adds:
        return {name: name for name in files}
    if files == [SINGLE]:
        # An index beside a `model.safetensors` is ignored by transformers, so the file takes a shard's name.
        return {SINGLE: f"model-00001-of-{1 + adds:05d}.safetensors"}
    if all(_NUMBERED.fullmatch(name) for name in files):
        total = len(files) + adds
        return {name: f"model-{number:05d}-of-{total:05d}.safetensors" for number, name in enumerate(files, 1)}
    return {name: name for name in files}


def _shard_names(names: Mapping[str, str], adds: int) -> list[str]:
    targets = list(names.values())
    if all(_NUMBERED.fullmatch(name) for name in targets):
        total = len(targets) + adds
        return [f"model-{len(targets) + number:05d}-of-{total:05d}.safetensors" for number in range(1, adds + 1)]
    # A copy of a copy may hold a shard of ours already.
    more = chain([UNNUMBERED_SHARD], (UNNUMBERED_SHARD.replace(".", f"-{number}.", 1) for number in count(2)))
    return list(islice((name for name in more if name not in targets), adds))


def _patch(file: Path, info: TensorInfo, tensor: torch.Tensor) -> int:
    raw = tensor_bytes(tensor)
    if tensor.dtype != DTYPES[info.dtype] or len(raw) != info.size:
        raise ValueError(f"{info.name}: {tensor.dtype} {tuple(tensor.shape)} does not fit {info.dtype} {info.shape}")
    with file.open("r+b") as handle:
        if os.fstat(handle.fileno()).st_nlink > 1:
            raise ValueError(f"{file} is another folder's file as well, and is not written to")
        handle.seek(info.start)
        handle.write(raw)
    return len(raw)


def _index_metadata(
    base: CheckpointFolder, layout: _Layout, added: Mapping[str, torch.Tensor | LazyTensor]
) -> dict[str, Any]:
    old = base.index if base.layout == "sharded" else {}
    metadata = dict(old["metadata"]) if isinstance(old.get("metadata"), dict) else {}
    metadata["total_size"] = sum(base.tensors[name].size for name in layout.kept)
    grown = [(base.tensors[name], order.shape(base.tensors[name].shape)) for name, order in layout.grown.items()]
    more = {info.name: math.prod(shape) - math.prod(info.shape) for info, shape in grown}
    metadata["total_size"] += sum(info.size // math.prod(info.shape) * more[info.name] for info, _ in grown)
    metadata["total_size"] += sum(tensor.nbytes for tensor in added.values())
    if isinstance(metadata.get("total_parameters"), int):
        metadata["total_parameters"] += sum(math.prod(tensor.shape) for tensor in added.values())
        metadata["total_parameters"] += sum(more.values())
        metadata["total_parameters"] -= sum(math.prod(base.tensors[name].shape) for name in layout.gone)
    return metadata


def _write_json(path: Path, value: Mapping[str, Any]) -> int:
    text = json.dumps(value, indent=2) + "\n"
    path.write_text(text, encoding="ascii")
    path.chmod(0o644)
    return len(text)
