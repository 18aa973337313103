"""What our writers wrote is read back the same, by our readers and by the stock ones."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.fuzz import seeds
from support.fuzz.stock import same_as_gguf, same_as_safetensors
from support.gguf_files import read_values

from patcher.checkpoint.folder import INDEX, CheckpointFolder
from patcher.checkpoint.gguf.file import read_floats
from patcher.checkpoint.gguf.format import F32
from patcher.checkpoint.gguf.model import read_model
from patcher.checkpoint.gguf.writer import (
    NewEntry,
    NewGgufFile,
    NewGgufTensor,
    floats_entry,
    i32_entry,
    text_entry,
    u32_entry,
)
from patcher.checkpoint.pieces import Bytes
from patcher.checkpoint.safetensors_file import DTYPES, read_header, read_tensor
from patcher.checkpoint.safetensors_writer import write_tensors
from patcher.checkpoint.writer import write_copy
from patcher.pairs.formats import load_pairs
from patcher.recipe.yaml_lines import parse_yaml

few = settings(max_examples=40, deadline=None, derandomize=True)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
NAME = TEXT.filter(lambda name: name != "__metadata__" and "\0" not in name)
SHAPES = st.lists(st.integers(0, 3), max_size=4)
TENSORS = st.dictionaries(NAME, st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES), min_size=1, max_size=5)


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def made(kinds: dict[str, tuple[str, list[int]]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, (dtype, shape) in kinds.items():
        size = torch.Size(shape).numel() * DTYPES[dtype].itemsize
        raw = torch.randint(0, 2 if dtype == "BOOL" else 256, (size,), dtype=torch.uint8, generator=generator)
        found[name] = raw.view(DTYPES[dtype]).reshape(shape)
    return found


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


@few
@given(TENSORS, st.dictionaries(NAME, TEXT, max_size=3))
def test_safetensors(kinds: dict[str, tuple[str, list[int]]], metadata: dict[str, str]) -> None:
    tensors = made(kinds)
    with folder() as place:
        path = place / "x.safetensors"
        assert write_tensors(path, tensors, metadata) == path.stat().st_size
        found = read_header(path)
        assert found.keys() == tensors.keys()
        assert all(same_bytes(read_tensor(info), tensors[name]) for name, info in found.items())
        same_as_safetensors(path, found)


@few
@given(st.lists(TENSORS, min_size=1, max_size=3), NAME, st.booleans())
def test_checkpoints_and_their_index(shards: list[dict[str, tuple[str, list[int]]]], new: str, metadata: bool) -> None:
    """A copy holds the base's tensors and the new one, each where the index says."""
    kinds = {name: kind for shard in shards for name, kind in shard.items()}
    owner = {name: number for number, shard in enumerate(shards) for name in shard}
    tensors = made(kinds)
    with folder() as place:
        base, stage = place / "base", place / "stage"
        base.mkdir()
        stage.mkdir()
        (base / "config.json").write_text(json.dumps(seeds.CONFIG))
        for number in set(owner.values()):
            held = {name: tensors[name] for name in tensors if owner[name] == number}
            save_file(held, base / f"part-{number}.safetensors")
        weight_map = {name: f"part-{number}.safetensors" for name, number in owner.items()}
        index: dict[str, Any] = {"weight_map": weight_map, **({"metadata": {"total_size": 1}} if metadata else {})}
        (base / INDEX).write_text(json.dumps(index))
        new = f"new {new}"
        written = write_copy(
            CheckpointFolder(base), stage, created={new: torch.ones(3)}, replaced={}, config_changes={"a": 1}
        )
        copy = CheckpointFolder(stage)
        assert written.bytes_written and copy.config == {**seeds.CONFIG, "a": 1}
        assert copy.tensors.keys() == {*tensors, new}
        for name, info in copy.tensors.items():
            assert info.file.name == copy.weight_map[name]
            assert same_bytes(read_tensor(info), tensors.get(name, torch.ones(3)))


ENTRIES = st.one_of(
    st.tuples(st.just(text_entry), TEXT),
    st.tuples(st.just(u32_entry), st.integers(0, 2**32 - 1)),
    st.tuples(st.just(i32_entry), st.integers(-(2**31), 2**31 - 1)),
    st.tuples(st.just(floats_entry), st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=4)),
)
GGUF_NAME = st.text("abcdefghij.é_0", min_size=1, max_size=20)
GGUF_SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@few
@given(
    st.dictionaries(GGUF_NAME, ENTRIES, max_size=4),
    st.dictionaries(GGUF_NAME, GGUF_SHAPES, min_size=1, max_size=4),
    st.sampled_from([8, 32, 64]),
    st.none() | st.integers(1, 9).map(lambda count: count * 64),
)
def test_gguf(entries: dict[str, Any], shapes: dict[str, list[int]], alignment: int, like: int | None) -> None:
    new: list[NewEntry] = [text_entry("general.architecture", "llama"), u32_entry("general.alignment", alignment)]
    for key, (make, value) in entries.items():
        new.append(make(key, torch.tensor(value).numpy().tobytes() if make is floats_entry else value))
    tensors = {name: seeds.tensor(*shape, seed=len(name)) for name, shape in shapes.items()}
    placed = [
        NewGgufTensor(name, tuple(shapes[name]), F32, Bytes(tensor.numpy().tobytes()))
        for name, tensor in tensors.items()
    ]
    with folder() as place:
        path = place / "x.gguf"
        with path.open("wb") as file:
            NewGgufFile(3, alignment, new, placed, like).write(file)
        model = read_model(path)
        assert list(model.tensors) == list(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(read_floats(model.tensors[name]).reshape(-1), tensor.reshape(-1))
        for key, (make, value) in entries.items():
            if make is floats_entry:
                assert read_values(model.first, key) == value
            else:
                assert model.first.scalar(key) == value
        same_as_gguf(path, model)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=12,
)


def keys_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Each key's path, and the marker that stands in it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*path, key), key
            yield from keys_of(item, (*path, key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from keys_of(item, (*path, number))


def marked(value: Any, count: list[int]) -> Any:
    """The same with keys that stand in one place each."""
    if isinstance(value, dict):
        found = {}
        for item in value.values():
            count[0] += 1
            key = f"key{count[0]}x"
            found[key] = marked(item, count)
        return found
    return [marked(item, count) for item in value] if isinstance(value, list) else value


@few
@given(st.dictionaries(TEXT, VALUES, min_size=1, max_size=4))
def test_yaml_and_its_line_numbers(value: dict[str, Any]) -> None:
    value = marked(value, [0])
    text = yaml.safe_dump(value, allow_unicode=True, sort_keys=False, width=40)
    document = parse_yaml(text, "r.yaml")
    assert document.value == yaml.safe_load(text) == value
    lines = text.split("\n")
    for path, key in keys_of(value):
        (number,) = (at for at, line in enumerate(lines, 1) if f"{key}:" in line)
        assert document.where(path) == f"r.yaml:{number}"


SAID = TEXT.filter(lambda text: text.strip() and "\0" not in text and "\r" not in text)


@few
@given(
    st.lists(st.tuples(st.none() | SAID, SAID, SAID), min_size=1, max_size=5), st.sampled_from(["json", "jsonl", "csv"])
)
def test_pairs(rows: list[tuple[str | None, str, str]], suffix: str) -> None:
    rows = [row for row in rows if row[1] != row[2]]
    if not rows:
        return
    keys = ("prompt", "positive", "negative")
    found = [{key: text for key, text in zip(keys, row, strict=True) if text is not None} for row in rows]
    if suffix == "csv":
        target = io.StringIO(newline="")
        writer = csv.writer(target)
        writer.writerows([keys, *([text or "" for text in row] for row in rows)])
        content = target.getvalue()
    elif suffix == "jsonl":
        content = "\n".join(json.dumps(row, ensure_ascii=False) for row in found)
    else:
        content = json.dumps(found)
    with folder() as place:
        (place / f"p.{suffix}").write_bytes(content.encode())
        pairs = load_pairs(f"p.{suffix}", base_folder=place, where="recipe")
    assert [(pair.prompt, pair.positive, pair.negative) for pair in pairs] == rows


def test_the_round_trips_would_see_a_difference() -> None:
    """What is compared is compared bit by bit."""
    tensors = made({"a": ("F32", [2, 2])})
    with folder() as place:
        write_tensors(place / "x.safetensors", tensors)
        raw = bytearray((place / "x.safetensors").read_bytes())
        raw[-1] ^= 1
        (place / "x.safetensors").write_bytes(raw)
        assert not same_bytes(read_tensor(read_header(place / "x.safetensors")["a"]), tensors["a"])
    with pytest.raises(ValueError):
        (_,) = (at for at, line in enumerate(["key1x: 1", "key1x: 2"]) if "key1x:" in line)
