"""GGUF models: in one file and in several, copied with a vector, patched where they lie, and finished later."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from support.fuzz import seeds
from support.fuzz.registry import each, reader
from support.fuzz.stock import same_as_gguf
from support.fuzz.watch import Case
from support.gguf_files import read_values

from patcher.checkpoint.gguf import in_place
from patcher.checkpoint.gguf.file import read_floats
from patcher.checkpoint.gguf.format import SCALARS
from patcher.checkpoint.gguf.model import GgufModel, read_model, split_name
from patcher.gguf import provenance
from patcher.gguf.edits import GgufEdit
from patcher.gguf.patch import patch_in_place, write_patched

F32 = 0
FIRST = split_name(Path("model.gguf"), 0, 2).name
_GGUF = each("model.gguf", seeds.gguf_file, lambda: seeds.gguf_file("qwen2"), seeds.patched_gguf)


def _edit() -> GgufEdit:
    return GgufEdit("love", seeds.LAYER, seeds.tensor(seeds.GGUF_HIDDEN), 1.0)


def _values(model: GgufModel) -> GgufModel:
    for key, entry in model.first.entries.items():
        if entry.type in SCALARS:
            read_values(model.first, key)
    for tensor in model.tensors.values():
        if tensor.type == F32:
            read_floats(tensor)
    provenance.read_edits(model.first)
    return model


@reader("gguf", _GGUF, lambda folder, found: same_as_gguf(folder / "model.gguf", found))
def _gguf(folder: Path, _out: Path) -> GgufModel:
    return _values(read_model(folder / "model.gguf"))


@reader("gguf patch", _GGUF, cost=2)
def _gguf_patch(folder: Path, out: Path) -> Any:
    target = out / "out.gguf"
    write_patched(read_model(folder / "model.gguf"), [_edit()], target, add=True, link=False, force=False)
    return _values(read_model(target))


@reader("gguf split", lambda: [seeds.split_gguf()])
def _gguf_split(folder: Path, out: Path) -> Any:
    model = read_model(folder / FIRST)
    write_patched(model, [_edit()], out / "out.gguf", add=True, link=False, force=False)
    return _values(read_model(split_name(out / "out.gguf", 0, len(model.files))))


@reader("gguf in place", each("model.gguf", seeds.gguf_file, seeds.patched_gguf), cost=2)
def _gguf_in_place(folder: Path, out: Path) -> Any:
    target = out / "model.gguf"
    shutil.copyfile(folder / "model.gguf", target)
    former, in_place._insert = in_place._insert, _insert
    try:
        patch_in_place(read_model(target), [_edit()], add=True)
    finally:
        in_place._insert = former
    return _values(read_model(target))


def _insert(descriptor: int, size: int) -> None:
    """What the file system does, which only some can."""
    end = os.fstat(descriptor).st_size
    content = os.pread(descriptor, end, 0)
    os.pwrite(descriptor, bytes(size) + content, 0)


def _journals() -> list[Case]:
    words = {"size": 8, "insert": 0, "writes": [[0, 4], [6, 2]]}
    return [{"head.json": json.dumps(words).encode(), "payload": b"abcdef", "m.gguf": b"GGUF1234"}]


@reader("gguf journal", _journals)
def _journal(folder: Path, out: Path) -> Any:
    target = out / "m.gguf"
    head, payload, content = (_content(folder / name) for name in ("head.json", "payload", "m.gguf"))
    target.write_bytes(content)
    # The sum is made to hold, or nothing behind it would be reached.
    with contextlib.suppress(ValueError, RecursionError, TypeError):
        head = json.dumps({**json.loads(head), "sha256": hashlib.sha256(payload).hexdigest()}).encode()
    (out / ".m.gguf.steering-journal").write_bytes(head + b"\n" + payload)
    return in_place.finish_interrupted(target)


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""
