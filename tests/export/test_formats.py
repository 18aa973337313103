"""Every format holds the same vector, bit for bit, and none is written where it would not steer."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.building import build_recipe
from support.exported import patched, unverified, vectors_for
from support.tiny_models import tiny_checkpoint
from support.vector_files import load_vector_file, reading_of

from patcher.cli import main
from patcher.errors import InputError, MissingExtraError, OutsideError
from patcher.export import FORMATS, export_folder

HIDDEN = 64
LAYERS = [1, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, steered after two blocks."""
    place = tmp_path_factory.mktemp("export")
    tiny_checkpoint(place / "base", "meta-llama--Llama-3.2-1B")
    with pytest.MonkeyPatch.context() as patch:
        return patched(place / "base", vectors_for(LAYERS, HIDDEN), place / "steered", patch)


def contents(path: Path) -> dict[str, bytes]:
    return {str(item.relative_to(path)): item.read_bytes() for item in path.rglob("*") if item.is_file()}


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_reads_back_bit_for_bit(folder: Path, tmp_path: Path, format: str) -> None:
    before = contents(folder)
    result = export_folder(folder, format, tmp_path / "export")
    suffix = {"vector": ".safetensors", "control-vector": ".gguf"}.get(format, "")
    place = tmp_path / f"named{suffix}"
    result.output.rename(place)
    for layer, vector in vectors_for(LAYERS, HIDDEN).items():
        assert torch.equal(load_vector_file(place, layer=layer, hidden=HIDDEN), vector)
    with pytest.raises(InputError, match="no vector for layer 2"):
        load_vector_file(place, layer=2, hidden=HIDDEN)
    assert result.layers == {1: ["love"], 3: ["love"]}
    assert contents(folder) == before
    assert not list(tmp_path.glob(".*partial*"))


def test_the_folders_own_vectors_are_chosen_by_layer(folder: Path) -> None:
    for layer, vector in vectors_for(LAYERS, HIDDEN).items():
        for path in (folder / "steering.safetensors", folder):
            assert torch.equal(load_vector_file(path, layer=layer, hidden=HIDDEN), vector)


def test_vectors_of_ours_are_not_known_by_the_names_that_people_gave_them(tmp_path: Path) -> None:
    path = tmp_path / "steering.safetensors"
    save_file({"love.layer.1": torch.ones(HIDDEN), "v.layer.1": torch.ones(HIDDEN)}, path, {"tool": "patch-model"})
    with pytest.raises(InputError, match="several tensors of this file may be meant for layer 1"):
        load_vector_file(path, layer=1, hidden=HIDDEN)
    save_file({"v.layer.1": torch.ones(HIDDEN)}, path, {"tool": "patch-model"})
    assert torch.equal(load_vector_file(path, layer=1, hidden=HIDDEN), torch.ones(HIDDEN))


def test_a_coefficient_that_is_in_the_vector_already_is_told(folder: Path, tmp_path: Path) -> None:
    exports = [export_folder(folder, format, tmp_path / format).output for format in ("vector", "peft")]
    for path in (folder, *exports):
        told = reading_of(path, 1, HIDDEN, coefficient=2.0).notes
        assert any("times its coefficient, which is multiplied by 2 again" in note for note in told)
        assert not any("again" in note for note in reading_of(path, 1, HIDDEN, coefficient=1.0).notes)


def test_a_steering_adapter_that_is_to_be_merged_is_a_vector(folder: Path, tmp_path: Path) -> None:
    adapter = export_folder(folder, "peft", tmp_path / "adapter").output
    recipe = json.loads(folder.with_suffix(".yaml").read_text())
    (tmp_path / "r.yaml").write_text(json.dumps({**recipe, "adapter": str(adapter)}))
    with pytest.raises(InputError) as caught:
        build_recipe(tmp_path / "r.yaml", tmp_path / "out")
    assert caught.value.problems[0].remedy == (
        f"it only adds a constant: give it as a vector, `method: file` with `file: {adapter}`"
    )  # which is what the next test does


def test_a_recipe_takes_an_export_as_its_vector(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a folder to an adapter to another folder: the same bits."""
    adapter = export_folder(folder, "peft", tmp_path / "adapter").output
    recipe = json.loads(folder.with_suffix(".yaml").read_text())
    recipe["vectors"][0]["file"] = str(adapter)
    (tmp_path / "again.yaml").write_text(json.dumps(recipe))
    unverified(monkeypatch)
    build_recipe(tmp_path / "again.yaml", tmp_path / "again")
    before, after = (load_file(place / "steering.safetensors") for place in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_vectors_of_one_layer_are_added_up(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "two"
    copy.mkdir()
    for item in folder.iterdir():
        if item.is_file():
            os.link(item, copy / item.name)
    manifest = json.loads((copy / "steering.json").read_text())
    manifest["edits"].append({**manifest["edits"][0], "name": "more", "tensor": "more"})
    (copy / "steering.json").unlink()
    (copy / "steering.json").write_text(json.dumps(manifest))
    tensors = load_file(copy / "steering.safetensors")
    (copy / "steering.safetensors").unlink()
    more = vectors_for([9], HIDDEN)[9] * 3.7
    save_file({**tensors, "more": more}, copy / "steering.safetensors")
    result = export_folder(copy, "vector", tmp_path / "sum.safetensors")
    wanted = (tensors["love.layer.1"].double() + more.double()).float()
    assert torch.equal(load_vector_file(result.output, layer=1, hidden=HIDDEN), wanted)
    assert result.layers[1] == ["love", "more"]


def test_what_a_vector_file_says_of_itself(folder: Path, tmp_path: Path) -> None:
    result = export_folder(folder, "vector", tmp_path / "v.safetensors")
    with safe_open(result.output, framework="pt") as file:
        metadata = file.metadata()
        assert sorted(file.keys()) == ["layer.1", "layer.3"]
    assert metadata["base"] == "base" and json.loads(metadata["vectors"]) == {"layer.1": ["love"], "layer.3": ["love"]}
    assert str(tmp_path) not in str(metadata) and str(folder.parent) not in str(metadata)
    assert stat.S_IMODE(result.output.stat().st_mode) == 0o644
    assert result.use == [f"vectors: [{{method: file, file: {result.output}, layer: [1, 3]}}]"]


def test_no_local_path_is_in_an_adapter(folder: Path, tmp_path: Path) -> None:
    result = export_folder(folder, "peft", tmp_path / "adapter")
    files = contents(result.output)
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert all(str(folder.parent).encode() not in text for text in files.values())
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None


@pytest.mark.parametrize("layer", [0, -1])
def test_block_0_and_the_embedding_are_no_place_for_a_control_vector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    tiny_checkpoint(tmp_path / "base", "openai-community--gpt2")
    steered = patched(tmp_path / "base", vectors_for([layer], HIDDEN), tmp_path / "steered", monkeypatch)
    with pytest.raises(InputError, match="adds no control vector") as caught:
        export_folder(steered, "control-vector", tmp_path / "v.gguf")
    assert "convert the patched folder itself" in str(caught.value)
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))
    vector = export_folder(steered, "vector", tmp_path / "v.safetensors")
    place = "before_layer: 0" if layer < 0 else "layer: 0"
    assert place in vector.use[0]
    assert torch.equal(load_vector_file(vector.output, layer=layer, hidden=HIDDEN), vectors_for([layer], HIDDEN)[layer])
    if layer < 0:
        with pytest.raises(InputError, match="PEFT has no constant that is added to an embedding"):
            export_folder(steered, "peft", tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_overwritten_but_an_export(folder: Path, tmp_path: Path, format: str) -> None:
    output = tmp_path / "there"
    export_folder(folder, format, output)
    with pytest.raises(InputError, match="the output exists"):
        export_folder(folder, format, output)
    number = output.stat().st_ino
    export_folder(folder, format, output, force=True)
    assert output.stat().st_ino != number
    assert [item.name for item in tmp_path.iterdir()] == ["there"]

    other = tmp_path / "other"
    other.write_text("precious")
    with pytest.raises(InputError, match="and this is none"):
        export_folder(folder, format, other, force=True)
    assert other.read_text() == "precious"
    (tmp_path / "link").symlink_to(output)
    with pytest.raises(InputError, match="and this is none"):
        export_folder(folder, format, tmp_path / "link", force=True)
    with pytest.raises(InputError, match="not a folder"):
        export_folder(folder, format, other / "inside")
    with pytest.raises(InputError, match="overlaps the patched folder"):
        export_folder(folder, format, folder / "inside")
    filled = tmp_path / "filled"
    filled.mkdir()
    (filled / "file").touch()
    with pytest.raises(InputError, match="and this is none"):
        export_folder(folder, format, filled, force=True)


def test_a_failed_write_keeps_what_was_there(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "adapter"
    export_folder(folder, "peft", output)
    before = contents(output)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutsideError, match="No space left"):
        export_folder(folder, "peft", output, force=True)
    with pytest.raises(OutsideError):
        export_folder(folder, "vector", tmp_path / "v.safetensors")
    assert contents(output) == before
    assert [item.name for item in tmp_path.iterdir()] == ["adapter"]


def test_a_replacement_that_fails_is_undone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "v.safetensors"
    export_folder(folder, "vector", output)
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.parent != tmp_path and not self.name.endswith("-old"):
            raise PermissionError(13, "Permission denied", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OutsideError):
        export_folder(folder, "vector", output, force=True)
    assert torch.equal(load_vector_file(output, layer=1, hidden=HIDDEN), vectors_for(LAYERS, HIDDEN)[1])


@pytest.mark.slow
def test_a_replacement_that_is_killed_between_two_renames_is_undone_by_the_next(folder: Path, tmp_path: Path) -> None:
    program = f"""
import ctypes, os, signal, sys
from pathlib import Path
from patcher.export import export_folder

def no_library(*_args, **_keys):
    raise OSError("no such library")

def killed(self, target):
    rename(self, target)
    if target.name.endswith("-old"):
        os.kill(os.getpid(), signal.SIGKILL)

export_folder(Path({str(folder)!r}), "peft", Path("adapter"))
rename, Path.rename, ctypes.CDLL = Path.rename, killed, no_library
export_folder(Path({str(folder)!r}), "peft", Path("adapter"), force=True)
"""
    subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    )
    assert not (tmp_path / "adapter").exists() and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(InputError, match="the output exists"):
        export_folder(folder, "peft", tmp_path / "adapter")
    assert load_vector_file(tmp_path / "adapter", layer=1, hidden=HIDDEN).any()
    export_folder(folder, "peft", tmp_path / "adapter", force=True)
    assert [item.name for item in tmp_path.iterdir()] == ["adapter"]


def test_control_vectors_without_the_package(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match="exporting a control vector needs the package gguf"):
        export_folder(folder, "control-vector", tmp_path / "v.gguf")
    assert not list(tmp_path.iterdir())


def test_folders_that_are_not_ours(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a patched folder"):
        export_folder(tmp_path, "vector", tmp_path.parent / "v.safetensors")


def test_a_damaged_vector_file(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("steering.json", "config.json"):
        (copy / name).write_bytes((folder / name).read_bytes())
    for content in (b"", (folder / "steering.safetensors").read_bytes()[:-9]):
        (copy / "steering.safetensors").write_bytes(content)
        with pytest.raises(InputError, match="vectors cannot be read"):
            export_folder(copy, "vector", tmp_path / "v.safetensors")
    save_file({"other": torch.zeros(3)}, copy / "steering.safetensors")
    with pytest.raises(InputError, match="vectors cannot be read"):
        export_folder(copy, "vector", tmp_path / "v.safetensors")


# The command


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(done.value.code or 0), captured.out, captured.err


def test_the_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "export", folder, "--format", "control-vector")
    assert code == 0 and out == ""
    assert "written: steered-control-vector.gguf" in err and "--control-vector" in err
    code, out, err = run(capsys, "export", folder, "--format", "peft", "--json")
    result = json.loads(out)
    assert code == 0 and err == "exporting as peft\n"
    assert result["output"] == "steered-peft" and [entry["layer"] for entry in result["layers"]] == LAYERS
    code, out, err = run(capsys, "export", folder, "--format", "peft", "--json")
    assert code == 2 and json.loads(out)["error"]["message"] == "the output exists"
    code, out, err = run(capsys, "export", folder, "--format", "onnx")
    assert code == 2 and "peft" in err
    code, out, err = run(capsys, "export", tmp_path / "none", "--format", "vector")
    assert code == 2 and "not a patched folder" in err


# Adapters as vectors


def adapter(folder: Path, config: dict, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


MODULE = "model.layers.5.mlp.down_proj"


def lora(folder: Path, *, a: float = 0.0, **config: object) -> Path:
    stem = f"base_model.model.{MODULE}"
    tensors = {
        f"{stem}.lora_A.weight": torch.full((2, 16), a),
        f"{stem}.lora_B.weight": torch.ones(HIDDEN, 2),
        f"{stem}.lora_B.bias": torch.arange(HIDDEN).float(),
    }
    return adapter(folder, {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "lora_bias": True, **config}, tensors)


def test_an_adapter_of_another_tool_is_taken_only_by_name(tmp_path: Path) -> None:
    path = lora(tmp_path / "lora")
    with pytest.raises(InputError, match="what a module's output gains"):
        load_vector_file(path, layer=5, hidden=HIDDEN)
    wanted = 4.0 * torch.arange(HIDDEN)
    assert torch.equal(load_vector_file(path, layer=5, hidden=HIDDEN, tensor=MODULE), wanted)
    weights = path / "adapter_model.safetensors"
    assert torch.equal(load_vector_file(weights, layer=5, hidden=HIDDEN, tensor=MODULE), wanted)
    path = lora(tmp_path / "rs", use_rslora=True)
    found = load_vector_file(path, layer=5, hidden=HIDDEN, tensor=MODULE)
    assert torch.allclose(found, 8 / 2**0.5 * torch.arange(HIDDEN))


def test_beft_adapters(tmp_path: Path) -> None:
    name = f"base_model.model.{MODULE}.beft_bias"
    path = adapter(tmp_path / "beft", {"peft_type": "BEFT"}, {name: torch.arange(HIDDEN).float()[None]})
    assert torch.equal(load_vector_file(path, layer=5, hidden=HIDDEN, tensor=MODULE), torch.arange(HIDDEN).float())


def test_adapters_that_are_no_vector(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="more than add a constant"):
        load_vector_file(lora(tmp_path / "more", a=1.0), layer=5, hidden=HIDDEN, tensor=MODULE)
    with pytest.raises(InputError, match="adds no constant"):
        load_vector_file(lora(tmp_path / "ia3", peft_type="IA3"), layer=5, hidden=HIDDEN)
    with pytest.raises(InputError, match="cannot be read as a PEFT adapter"):
        load_vector_file(lora(tmp_path / "pattern", alpha_pattern={"x": 1}), layer=5, hidden=HIDDEN)
    broken = lora(tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"garbage")
    with pytest.raises(InputError, match="cannot be read as a PEFT adapter"):
        load_vector_file(broken, layer=5, hidden=HIDDEN)
    (broken / "adapter_config.json").write_text("[]")
    with pytest.raises(InputError, match="cannot be read as a PEFT adapter"):
        load_vector_file(broken, layer=5, hidden=HIDDEN)
