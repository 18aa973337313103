"""Models in several GGUF files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.gguf_files import BIAS, edit, floats, patch, raw_tensors, vector
from support.gguf_models import write_model
from support.gguf_splits import split

from patcher.checkpoint.gguf.model import read_model, split_name
from patcher.errors import InputError


@pytest.mark.parametrize("empty_first", [False, True])
@pytest.mark.parametrize("link", [False, True])
def test_a_split_model_changes_in_its_first_file_only(tmp_path: Path, empty_first: bool, link: bool) -> None:
    write_model(tmp_path / "base.gguf", "llama", "Q4_K_M")
    first = split(tmp_path / "base.gguf", 3, empty_first=empty_first)
    result = patch(first, tmp_path / "steered.gguf", link=link)
    assert [path.name for path in result.files] == [f"steered-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    model = read_model(result.files[0])
    assert model.first.scalar("split.tensors.count") == len(model.tensors)
    for number in (1, 2):
        theirs = split_name(first, number, 3)
        assert result.files[number].read_bytes() == theirs.read_bytes()
        assert result.files[number].samefile(theirs) == link
    assert result.linked == (2 if link else 0)
    merged = {name: raw for path in result.files for name, raw in raw_tensors(path).items()}
    assert merged == {**raw_tensors(tmp_path / "base.gguf"), BIAS: vector().numpy().tobytes()}


def test_a_split_model_with_the_bias_in_another_file(tmp_path: Path) -> None:
    write_model(tmp_path / "base.gguf", "gpt2")
    first = split(tmp_path / "base.gguf", 4)
    result = patch(first, tmp_path / "steered-00001-of-00004.gguf", edit(0), edit(2))
    model = read_model(result.files[0])
    assert list(model.tensors) == list(read_model(first).tensors)
    for layer in (0, 2):
        name = f"blk.{layer}.ffn_down.bias"
        assert torch.equal(floats(result.files[0], name), floats(first, name) + vector())


def test_a_split_model_is_relabelled_in_all_its_files(tmp_path: Path) -> None:
    write_model(tmp_path / "base.gguf", "phi3", "Q8_0")
    write_model(tmp_path / "same.gguf", "phi3", "Q8_0")
    first = split(tmp_path / "base.gguf", 3)
    result = patch(first, tmp_path / "steered.gguf")
    patch(tmp_path / "same.gguf", tmp_path / "whole.gguf")
    merged = {name: raw for path in result.files for name, raw in raw_tensors(path).items()}
    assert merged == raw_tensors(tmp_path / "whole.gguf")
    assert read_model(result.files[0]).first.scalar("split.tensors.count") == len(merged)


def test_a_broken_split_model_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "base.gguf", "llama")
    first = split(tmp_path / "base.gguf", 3)
    second, third = (split_name(first, number, 3) for number in (1, 2))
    output = tmp_path / "steered.gguf"
    with pytest.raises(InputError, match="not the first file"):
        patch(second, output)
    kept = second.read_bytes()
    shutil.copy(third, second)
    with pytest.raises(InputError, match="not the one it is named"):
        patch(first, output)
    second.unlink()
    with pytest.raises(InputError, match="no such GGUF file"):
        patch(first, output)
    second.write_bytes(kept)
    shutil.copy(first, tmp_path / "other.gguf")
    with pytest.raises(InputError, match="does not fit its content"):
        patch(tmp_path / "other.gguf", output)
    assert not list(tmp_path.glob("steered*"))
