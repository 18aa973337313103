"""What the stock readers make of the same file."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from patcher.checkpoint.gguf.model import GgufModel
from patcher.checkpoint.safetensors_file import DTYPES, TensorInfo, read_tensor


def same_numbers(found: Any, expected: Any) -> bool:
    """Equal, and a not-a-number is equal to itself."""
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same_numbers(found[key], expected[key]) for key in found)
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(same_numbers, found, expected))
    if isinstance(found, float) and isinstance(expected, float) and math.isnan(found):
        return math.isnan(expected)
    return type(found) is type(expected) and bool(found == expected)


def same_as_safetensors(path: Path, found: Mapping[str, TensorInfo]) -> None:
    """What we accept safetensors accepts, and reads the same."""
    if any(info.dtype not in DTYPES for info in found.values()):
        return
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(found)
        for name, info in found.items():
            piece = file.get_slice(name)
            assert (piece.get_dtype(), tuple(piece.get_shape())) == (info.dtype, info.shape)
            theirs, ours = file.get_tensor(name), read_tensor(info)
            assert theirs.dtype == ours.dtype and theirs.shape == ours.shape
            assert torch.equal(theirs.reshape(-1).view(torch.uint8), ours.reshape(-1).view(torch.uint8))


def same_as_gguf(path: Path, model: GgufModel) -> None:
    """The same as gguf-py, which checks less, so that it must not even fail."""
    import gguf

    theirs = gguf.GGUFReader(path)
    assert theirs.data_offset == model.first.data_start or not model.tensors
    assert [tensor.name for tensor in theirs.tensors] == list(model.tensors)
    for tensor in theirs.tensors:
        own = model.tensors[tensor.name]
        assert (own.start, own.size) == (tensor.data_offset, tensor.n_bytes)
        assert list(own.shape) == [int(number) for number in tensor.shape]
        assert own.type == int(tensor.tensor_type)
    fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert list(fields) == list(model.first.entries)
    for key, entry in model.first.entries.items():
        if entry.scalar is not None:
            value = fields[key].contents()
            assert same_numbers(entry.scalar, value.item() if hasattr(value, "item") else value), key


def same_yaml(path: Path, recipe: Any) -> None:
    """The recipe is the one that plain PyYAML's value makes."""
    import yaml

    from patcher.recipe.schema import Recipe

    plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert Recipe.model_validate(plain) == recipe


def same_pairs(path: Path, pairs: list[Any]) -> None:
    """As many pairs as rows, with their texts."""
    text = path.read_bytes().decode("utf-8-sig")
    if path.suffix == ".json":
        document = json.loads(text)
        rows = document if isinstance(document, list) else document.get("pairs", document.get("data"))
        if isinstance(document, dict) and not isinstance(rows, list):
            rows = document["data"]
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    else:
        cells = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
        rows = [dict(zip([name.strip() for name in cells[0]], row, strict=True)) for row in cells[1:]]
    assert len(rows) == len(pairs)
    for row, pair in zip(rows, pairs, strict=True):
        ab = pair.format == "ab"
        keys = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
        expected = [row.get(key) for key in (keys if ab else ("prompt", "positive", "negative"))]
        assert [expected[0] or None, *expected[1:]] == [pair.prompt, pair.positive, pair.negative]
