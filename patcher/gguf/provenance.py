"""What a patched GGUF file says about itself: which vectors it holds, in which tensors, and what was there before."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import patcher
from patcher.checkpoint.gguf.format import GgufFile
from patcher.checkpoint.gguf.writer import NewEntry, floats_entry, kept_entry, text_entry, u32_entry
from patcher.checkpoint.safetensors_file import tensor_bytes
from patcher.errors import InputError
from patcher.gguf.edits import GgufEdit
from patcher.gguf.slots import GgufSlot

PREFIX = "steering."
_FORMAT, _TOOL, _EDITS, _BASE = (PREFIX + name for name in ("format", "tool", "edits", "base_architecture"))
_VECTOR, _ORIGINAL = PREFIX + "vector.", PREFIX + "original."
FORMAT = 1


def read_edits(file: GgufFile) -> list[dict[str, Any]]:
    """The edits that the file says it holds; none if it was not patched.

    Raises:
        InputError: it was patched by a version that is not known, or says so in a way that cannot be read.
    """
    if not any(key.startswith(PREFIX) for key in file.entries):
        return []
    found = file.scalar(_FORMAT)
    try:
        edits = json.loads(str(file.scalar(_EDITS)))
    except ValueError:
        edits = None
    if found != FORMAT or not isinstance(edits, list) or not all(isinstance(edit, dict) for edit in edits):
        raise InputError(
            "this file was patched, in a way that this version does not know",
            where=f"{file.path}: {_FORMAT}",
            found=found,
            remedy="start from the unpatched file, or upgrade patch-model",
            code="gguf_patched",
        )
    return edits


def check_unpatched(file: GgufFile, *, add: bool) -> None:
    """Refuse a file that holds vectors already, unless they shall add up.

    Raises:
        InputError: see there.
    """
    edits = read_edits(file)
    if edits and not add:
        held = ", ".join(f"{edit.get('name')} in block {edit.get('layer')}" for edit in edits)
        raise InputError(
            "this file was patched already, and the vectors would add up",
            where=str(file.path),
            found=held,
            remedy="start from the unpatched file, or let them add up: --add",
            code="gguf_patched",
        )


def entries(
    file: GgufFile, edits: Sequence[GgufEdit], slots: Mapping[int, GgufSlot], base_architecture: str | None
) -> list[NewEntry]:
    """The entries that tell of these edits and of those that the file holds already.

    Args:
        file: the source, whose own entries of this kind are not to be written besides.
        edits: what was added now.
        slots: block -> the tensor that holds it. What it held before is kept too, but for what an earlier patch kept.
        base_architecture: what the source calls itself, if the copy has another name.
    """
    former = read_edits(file)
    told = [
        {**edit.as_json(), "tensor": slots[edit.layer].name, "values": f"{_VECTOR}{number}"}
        for number, edit in enumerate(edits, start=len(former))
    ]
    kept = [
        kept_entry(entry, file)
        for key, entry in file.entries.items()
        if key.startswith((_VECTOR, _ORIGINAL)) or (key == _BASE and base_architecture is None)
    ]
    here = {entry.key for entry in kept}
    found = [
        u32_entry(_FORMAT, FORMAT),
        text_entry(_TOOL, f"patch-model {patcher.__version__}"),
        text_entry(_EDITS, json.dumps(former + told)),
        *kept,
    ]
    if base_architecture is not None:
        found.append(text_entry(_BASE, base_architecture))
    for edit, words in zip(edits, told, strict=True):
        found.append(floats_entry(str(words["values"]), bytes(tensor_bytes(edit.vector))))
    changed_before = {str(edit.get("tensor")) for edit in former}
    for slot in slots.values():
        before = slot.before()
        # What an earlier patch created has no original.
        if before is not None and _ORIGINAL + slot.name not in here and slot.name not in changed_before:
            found.append(floats_entry(_ORIGINAL + slot.name, bytes(tensor_bytes(before))))
    return found


def is_ours(key: str) -> bool:
    """Whether a metadata key is one of these."""
    return key.startswith(PREFIX)
