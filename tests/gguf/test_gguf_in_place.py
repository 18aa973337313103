"""GGUF files patched where they lie."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from support.gguf_files import edit, patch, raw_entries, raw_tensors
from support.gguf_models import write_model
from support.gguf_splits import split

from patcher.checkpoint.gguf.file import read_gguf
from patcher.checkpoint.gguf.in_place import _journal, finish_interrupted
from patcher.checkpoint.gguf.model import read_model, split_name
from patcher.errors import InputError, OutsideError
from patcher.gguf.patch import patch_in_place


def in_place_works(folder: Path) -> bool:
    write_model(folder / "probe.gguf", "llama")
    try:
        patch_in_place(read_model(folder / "probe.gguf"), [edit()], add=False)
    except OutsideError:
        return False
    finally:
        (folder / "probe.gguf").unlink()
    return True


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt-oss"])
def test_in_place_gives_the_same_file(tmp_path: Path, architecture: str) -> None:
    if not in_place_works(tmp_path):
        pytest.skip("this file system cannot insert bytes into a file")
    source, output = tmp_path / "base.gguf", tmp_path / "steered.gguf"
    write_model(source, architecture, "Q8_0")
    patch(source, output, edit(0), edit(2, 1))
    node = source.stat().st_ino
    patch_in_place(read_model(source), [edit(0), edit(2, 1)], add=False)
    assert source.stat().st_ino == node
    assert raw_tensors(source) == raw_tensors(output)
    assert raw_entries(source) == raw_entries(output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.gguf", "steered.gguf"]
    patch_in_place(read_model(source), [edit(1, 2)], add=True)
    patch(output, tmp_path / "again.gguf", edit(1, 2), add=True)
    assert raw_tensors(source) == raw_tensors(tmp_path / "again.gguf")


def test_in_place_in_a_split_model(tmp_path: Path) -> None:
    if not in_place_works(tmp_path):
        pytest.skip("this file system cannot insert bytes into a file")
    write_model(tmp_path / "base.gguf", "gpt2")
    first = split(tmp_path / "base.gguf", 4)
    result = patch(first, tmp_path / "steered.gguf")
    patch_in_place(read_model(first), [edit()], add=False)
    for number, path in enumerate(result.files):
        assert raw_tensors(split_name(first, number, 4)) == raw_tensors(path)


def test_in_place_leaves_links_and_relabellings_alone(tmp_path: Path) -> None:
    source = tmp_path / "base.gguf"
    write_model(source, "llama")
    os.link(source, tmp_path / "other.gguf")
    (tmp_path / "link.gguf").symlink_to(source)
    before = source.read_bytes()
    for path in (source, tmp_path / "link.gguf"):
        with pytest.raises(InputError, match="other names"):
            patch_in_place(read_model(path), [edit()], add=False)
    write_model(tmp_path / "qwen2.gguf", "qwen2")
    with pytest.raises(InputError, match="relabelled"):
        patch_in_place(read_model(tmp_path / "qwen2.gguf"), [edit()], add=False)
    assert source.read_bytes() == before


@pytest.mark.parametrize("stop", ["journal", "insert", "header"])
def test_an_interrupted_patch_in_place_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str) -> None:
    if not in_place_works(tmp_path):
        pytest.skip("this file system cannot insert bytes into a file")
    from patcher.checkpoint.gguf import in_place as gguf_in_place

    source, output = tmp_path / "base.gguf", tmp_path / "steered.gguf"
    write_model(source, "llama", "Q8_0")
    patch(source, output)
    apply = gguf_in_place._apply

    def stopped(file: Any, path: Path, change: Any) -> None:
        if stop != "journal":
            gguf_in_place._insert(file.fileno(), change.insert)
        if stop == "header":
            file.seek(0)
            file.write(change.writes[0][1][: len(change.writes[0][1]) // 2])
            file.flush()
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_in_place, "_apply", stopped)
    with pytest.raises(KeyboardInterrupt):
        patch_in_place(read_model(source), [edit()], add=False)
    monkeypatch.setattr(gguf_in_place, "_apply", apply)
    if stop == "insert":
        with pytest.raises(InputError, match="not a GGUF file"):
            read_gguf(source)
    assert finish_interrupted(source) == [source]
    assert raw_tensors(source) == raw_tensors(output)
    assert not _journal(source).exists()
    assert finish_interrupted(source) == []


def test_a_journal_that_is_not_complete_is_dropped(tmp_path: Path) -> None:
    source = tmp_path / "base.gguf"
    write_model(source, "llama")
    before = source.read_bytes()
    _journal(source).write_bytes(b'{"size": 1')
    assert finish_interrupted(source) == []
    assert source.read_bytes() == before
    assert not _journal(source).exists()


@pytest.mark.parametrize("done", [0, 1, 2])
def test_an_interrupted_patch_of_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int) -> None:
    """Either nothing was agreed upon, or all files are finished."""
    if not in_place_works(tmp_path):
        pytest.skip("this file system cannot insert bytes into a file")
    from patcher.checkpoint.gguf import in_place as gguf_in_place

    write_model(tmp_path / "base.gguf", "gpt2")
    first = split(tmp_path / "base.gguf", 4)
    result = patch(first, tmp_path / "steered.gguf", edit(0), edit(2))
    before = raw_tensors(first)
    name = "_apply" if done else "_save"
    real, calls = getattr(gguf_in_place, name), []

    def stopped(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) > max(done, 1):
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(gguf_in_place, name, stopped)
    with pytest.raises(KeyboardInterrupt):
        patch_in_place(read_model(first), [edit(0), edit(2)], add=False)
    monkeypatch.setattr(gguf_in_place, name, real)
    assert bool(finish_interrupted(first)) == bool(done)
    assert not list(tmp_path.glob(".*journal"))
    if not done:
        assert raw_tensors(first) == before
        patch_in_place(read_model(first), [edit(0), edit(2)], add=False)
    for number, path in enumerate(result.files):
        assert raw_tensors(split_name(first, number, 4)) == raw_tensors(path)
