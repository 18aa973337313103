"""What unpatch does not claim: bases that are not in the folder, and folders that were changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import hashes
from support.patched_folders import back, edit_manifest, odd_header, patched, refused
from support.tiny_models import default_checkpoint, tiny_checkpoint

from patcher.checkpoint.folder import SINGLE
from patcher.checkpoint.steering_files import MANIFEST, VECTORS
from patcher.errors import CheckFailed, InputError, PatchModelError

LLAMA, GPT2, QWEN2, QWEN3 = (
    "meta-llama--Llama-3.2-1B", "openai-community--gpt2", "Qwen--Qwen2.5-0.5B", "Qwen--Qwen3-8B"
)  # fmt: skip


@pytest.fixture
def phi3(tmp_path: Path) -> tuple[Path, Path]:
    """Fused weights were taken apart: the base's are kept nowhere."""
    base, out = tmp_path / "base", tmp_path / "out"
    layer = default_checkpoint(base, "phi3")
    manifest = patched(base, out, layer)
    assert manifest["undo"].keys() == {"lost"}
    return base, out


def test_a_base_that_was_made_into_another_is_refused(phi3: tuple[Path, Path]) -> None:
    base, out = phi3
    told = refused(InputError, out)
    assert "are not kept" in told and f"--base {base}" in told and "gate_up_proj" in told


def test_with_the_base_its_files_are_taken(phi3: tuple[Path, Path], tmp_path: Path) -> None:
    base, out = phi3
    (base / "README.md").write_text("not ours to bring")
    result = back(out, tmp_path / "back", base=str(base))
    assert hashes(tmp_path / "back") == {name: digest for name, digest in hashes(base).items() if name != "README.md"}
    assert SINGLE in result.identical
    linked = back(out, tmp_path / "linked", base=str(base), link=True)
    assert linked.bytes_written < result.bytes_written
    assert (tmp_path / "linked" / SINGLE).samefile(base / SINGLE)


def test_another_base_is_refused(phi3: tuple[Path, Path], tmp_path: Path) -> None:
    _base, out = phi3
    default_checkpoint(tmp_path / "other", "phi3", intermediate_size=64)
    assert "not the base" in refused(InputError, out, base=str(tmp_path / "other"))
    assert "no such model folder" in refused(InputError, out, base="./nowhere")


def test_a_merged_adapter_is_refused(tmp_path: Path) -> None:
    layer = tiny_checkpoint(tmp_path / "base", LLAMA)
    patched(tmp_path / "base", tmp_path / "out", layer, adapter={"name": "lora", "given": "x", "sha256": "0"})
    told = refused(InputError, tmp_path / "out")
    assert "`lora` was merged" in told and "--base" in told
    back(tmp_path / "out", tmp_path / "back", base=str(tmp_path / "base"))
    assert hashes(tmp_path / "back") == hashes(tmp_path / "base")


def test_pickles_come_back_as_safetensors(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    layer = tiny_checkpoint(base, GPT2, dtype=torch.bfloat16)
    tensors = load_file(base / SINGLE)
    torch.save(tensors, base / "pytorch_model.bin")
    (base / SINGLE).unlink()
    patched(base, out, layer)
    result = back(out, tmp_path / "back")
    assert result.missing == ["pytorch_model.bin"]
    assert any(".bin" in note for note in result.notes)
    again = load_file(tmp_path / "back" / SINGLE)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    back(out, tmp_path / "pickles", base=str(base))
    assert hashes(tmp_path / "pickles") == hashes(base)


def test_double_precision_is_not_claimed(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    layer = tiny_checkpoint(base, GPT2, dtype=torch.float64)
    manifest = patched(base, out, layer)
    assert len(manifest["undo"]["lost"]) == 1
    assert "are not kept" in refused(InputError, out)


# Folders that are not as they were written


def damage_weights(out: Path) -> None:
    file = next(iter(sorted(out.glob("model-*.safetensors"))))
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def damage_original(out: Path) -> None:
    tensors = load_file(out / VECTORS)
    name = next(name for name in tensors if name.startswith("original/"))
    tensors[name] = tensors[name] + 1
    save_file(tensors, out / VECTORS)


def drop_original(out: Path) -> None:
    save_file({name: value for name, value in load_file(out / VECTORS).items() if "/" not in name}, out / VECTORS)


def resize_original(out: Path) -> None:
    tensors = load_file(out / VECTORS)
    name = next(name for name in tensors if name.startswith("original/"))
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, out / VECTORS)


DAMAGE: dict[str, tuple[Callable[[Path], None], type[PatchModelError], str]] = {
    "weights": (damage_weights, CheckFailed, "did not come back"),
    "original": (damage_original, CheckFailed, "did not come back"),
    "no original": (drop_original, InputError, "not as it was written"),
    "short original": (resize_original, InputError, "not as it was written"),
    "a path": (
        edit_manifest(lambda m: m["undo"]["files"][0].update(base="../../evil.safetensors")),
        InputError,
        "not as it was written",
    ),
    "a path in the copy": (
        edit_manifest(lambda m: m["undo"]["files"][0].update(copy="../base/model.safetensors")),
        InputError,
        "not as it was written",
    ),
    "nonsense": (edit_manifest(lambda m: m["undo"].update(files=3)), InputError, "not as it was written"),
    "no record": (edit_manifest(lambda m: m.pop("undo")), InputError, "without a record"),
    "no shard": (lambda out: next(iter(sorted(out.glob("model-*")))).unlink(), InputError, "missing"),
    "no manifest": (lambda out: (out / MANIFEST).unlink(), InputError, "not a patched folder"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_folder_that_was_changed(tmp_path: Path, name: str) -> None:
    spoil, kind, words = DAMAGE[name]
    layer = tiny_checkpoint(tmp_path / "base", GPT2, sharded=True, dtype=torch.float16)
    patched(tmp_path / "base", tmp_path / "out", layer)
    spoil(tmp_path / "out")
    told = refused(kind, tmp_path / "out")
    assert words in told
    assert "remedy" in told


def test_a_header_that_is_of_other_tensors(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    tiny_checkpoint(base, GPT2, dtype=torch.bfloat16)
    odd_header(base)
    header = patched(base, out, -1, hash=False)["undo"]["files"][0]["header"]
    edit_manifest(lambda m: m["undo"]["files"][0].update(header=header.replace("wpe", "xyz")))(out)
    assert "of other tensors" in refused(InputError, out)


def test_a_small_file_that_was_changed_is_reported(tmp_path: Path) -> None:
    layer = tiny_checkpoint(tmp_path / "base", LLAMA)
    patched(tmp_path / "base", tmp_path / "out", layer)
    (tmp_path / "out" / "tokenizer_config.json").write_text("{}")
    result = back(tmp_path / "out", tmp_path / "back")
    assert result.different == ["tokenizer_config.json"]
    assert SINGLE in result.identical


def test_a_base_without_hashes_is_called_unchecked(tmp_path: Path) -> None:
    layer = tiny_checkpoint(tmp_path / "base", LLAMA)
    manifest = patched(tmp_path / "base", tmp_path / "out", layer, hash=False)
    assert {record["sha256"] for record in manifest["base"]["files"]} == {None}
    result = back(tmp_path / "out", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(tmp_path / "base")
    assert result.identical == []
    assert SINGLE in result.unchecked
    assert any("unchecked" in note for note in result.notes)


def test_outputs_that_are_refused(tmp_path: Path) -> None:
    layer = tiny_checkpoint(tmp_path / "base", LLAMA)
    patched(tmp_path / "base", tmp_path / "out", layer)
    for output in (tmp_path / "out", tmp_path / "out" / "inside", tmp_path):
        with pytest.raises(InputError, match="overlaps"):
            back(tmp_path / "out", output)
    with pytest.raises(InputError, match="not empty"):
        back(tmp_path / "out", tmp_path / "base")
    with pytest.raises(InputError, match="overlaps"):
        back(tmp_path / "out", tmp_path / "base" / "x", base=str(tmp_path / "base"))
