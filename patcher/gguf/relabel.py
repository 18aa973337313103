"""A GGUF model under another architecture's name: tensors renamed, whole rows reordered, no number changed.

llama.cpp rotates the rows of a head either as two halves or as neighbouring pairs, by architecture. A row is whole
blocks in every quantisation, so that reordering rows moves bytes and rounds nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from patcher.checkpoint.gguf.format import F32, GgufFile, GgufTensor, row_bytes
from patcher.checkpoint.gguf.model import GgufModel
from patcher.checkpoint.gguf.writer import NewEntry, NewGgufTensor, kept_entry, kept_tensor, text_entry
from patcher.checkpoint.pieces import Range, Rows
from patcher.errors import InputError

ADVICE = (
    "steer it when it runs: `patch-model export DIR --format control-vector` writes a file for llama.cpp's "
    "--control-vector"
)


@dataclass(frozen=True)
class Heads:
    """The attention's sizes: query heads, key/value heads, and rows in a head."""

    query: int
    key: int
    width: int


class Relabelling:
    """What a model's files become under another architecture's name.

    Args:
        model: the model.
        row: its entry in rows.json.
        every: what all relabellings share there.

    Raises:
        InputError: this model has something that the other architecture would read differently, or not at all.
    """

    def __init__(self, model: GgufModel, row: Mapping[str, Any], every: Mapping[str, Any]) -> None:
        self.model, self.row = model, row
        self.to: str = row["to"]
        self.heads = _heads(model, self.to)
        self.keys = {*every["keys"], *row.get("keys", ())}
        self.rules = {**every["tensors"], **row.get("tensors", {})}
        self.notes = [note for key, note in row.get("notes", {}).items() if model.scalar(key)]
        self._check_keys()

    def entries(self, file: GgufFile) -> list[NewEntry]:
        """The metadata of a file of the copy."""
        prefix = self.model.architecture + "."
        found = []
        for key, entry in file.entries.items():
            if key == "general.architecture":
                found.append(text_entry(key, self.to))
            elif not key.startswith(prefix):
                found.append(kept_entry(entry, file))
            elif key.removeprefix(prefix) in self.keys:
                found.append(kept_entry(entry, file, f"{self.to}.{key.removeprefix(prefix)}"))
        if file is self.model.first:
            there = {entry.key for entry in found}
            for tensor, wanted in self.row.get("when", {}).items():
                if tensor in self.model.tensors:
                    added = {f"{self.to}.{key}": value for key, value in wanted.items()}
                    found += [text_entry(key, value) for key, value in added.items() if key not in there]
        return found

    def tensors(self, file: GgufFile) -> list[NewGgufTensor]:
        """The tensors of a file of the copy.

        Raises:
            InputError: one has no place in the other architecture.
        """
        return [placed for tensor in file.tensors.values() for placed in self._placed(tensor)]

    def _placed(self, tensor: GgufTensor) -> list[NewGgufTensor]:
        for pattern, targets in self.rules.items():
            match = re.fullmatch(re.escape(pattern).replace(r"\*", r"(\d+)"), tensor.name)
            if match:
                block = match.group(1) if match.groups() else ""
                return [self._part(tensor, name.replace("*", block), *part) for name, *part in targets]
        raise self._refusal("it has a tensor that that architecture does not read", tensor.name)

    def _part(self, tensor: GgufTensor, name: str, part: str | None = None) -> NewGgufTensor:
        if part is None:
            return kept_tensor(tensor, name)
        # A bias is one row of numbers: each of them is a row here.
        flat = len(tensor.shape) == 1
        if len(tensor.shape) > 2 or (flat and tensor.type != F32) or not tensor.size:
            raise self._refusal("a tensor has an unexpected shape or type", tensor.name, tensor)
        width = row_bytes(tensor.type, 1 if flat else tensor.shape[0])
        rows = tensor.shape[-1]
        first, count, whole = self._rows(part, rows)
        if rows != whole:
            raise self._refusal("a tensor does not have the rows that the metadata promises", tensor.name, tensor)
        shape = (count,) if flat else (tensor.shape[0], count)
        start = tensor.start + first * width
        if self.row.get("order") == "pairs" and part[0] in "qk":
            half = self.heads.width // 2
            order = tuple(place for pair in range(half) for place in (pair, pair + half))
            rows_of_heads = Rows(tensor.file, start, width, order, count // self.heads.width)
            return NewGgufTensor(name, shape, tensor.type, rows_of_heads)
        return NewGgufTensor(name, shape, tensor.type, Range(tensor.file, start, count * width))

    def _rows(self, part: str, rows: int) -> tuple[int, int, int]:
        """Where a part begins, how many rows it has, and how many rows the tensor should have."""
        query, key = self.heads.query * self.heads.width, self.heads.key * self.heads.width
        return {
            "q": (0, query, query),
            "k": (0, key, key),
            "q of qkv": (0, query, query + 2 * key),
            "k of qkv": (query, key, query + 2 * key),
            "v of qkv": (query + key, key, query + 2 * key),
            "first half": (0, rows // 2, rows // 2 * 2),
            "second half": (rows // 2, rows // 2, rows // 2 * 2),
        }[part]

    def _check_keys(self) -> None:
        prefix = self.model.architecture + "."
        known = {*self.keys, *self.row.get("drop", ())}
        for key in self.model.first.entries:
            if key.startswith(prefix) and key.removeprefix(prefix) not in known:
                raise self._refusal("that architecture may read a metadata entry differently", key)
            # Lists of tensor names, which would have to be renamed as well.
            if key.startswith("general.tensor_extra"):
                raise self._refusal("its metadata names tensors", key)
        for tensor, wanted in self.row.get("when", {}).items():
            for key, value in wanted.items():
                found = self.model.scalar(key)
                if tensor in self.model.tensors and found not in (None, value):
                    raise self._refusal(f"with {tensor} it should be {value}", prefix + key, found)

    def _refusal(self, why: str, where: str, found: object = None) -> InputError:
        if isinstance(found, GgufTensor):
            found = f"{found.type_name} {list(found.shape)}"
        return unsupported(self.model, f"it cannot be relabelled as {self.to} exactly: {why}", where, found)


def _heads(model: GgufModel, to: str) -> Heads:
    hidden, query = model.number("embedding_length"), model.number("attention.head_count")
    key = model.scalar("attention.head_count_kv")
    width = model.scalar("attention.key_length") or hidden // query
    value = model.scalar("attention.value_length") or width
    rotated = model.scalar("rope.dimension_count") or width
    if not isinstance(key, int) or isinstance(key, bool):
        key = query if f"{model.architecture}.attention.head_count_kv" not in model.first.entries else 0
    if not isinstance(width, int) or width < 2 or width % 2 or value != width or rotated != width or key < 1:
        found = f"head {width} by {value}, {rotated} of it rotated, {query} query and {key} key heads"
        raise unsupported(
            model, f"it cannot be relabelled as {to}, which rotates whole heads of one size", "attention", found
        )
    return Heads(query, key, width)


def unsupported(model: GgufModel, why: str, where: str, found: object = None) -> InputError:
    """The refusal of a model, with the advice that always works."""
    return InputError(
        f"no bias can steer this {model.architecture} file: {why}",
        where=f"{model.first.path}: {where}",
        found=found,
        remedy=ADVICE,
        code="gguf_architecture",
    )
