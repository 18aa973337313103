"""What is checked of a copy most of whose weights are on the Hub, and that each check fails on what it is for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import default_checkpoint, tiny_checkpoint
from support.writing import write_steered

from patcher.architectures.analysis import Architecture
from patcher.checkpoint.block_names import block_names, tensors_for_blocks
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.hub_folder import HubCheckpoint, HubFile
from patcher.checkpoint.prepare import read_config
from patcher.checkpoint.safetensors_file import raw_header, read_tensor
from patcher.checkpoint.source import Source
from patcher.errors import InputError
from patcher.patched.schema import Patch
from patcher.patched.stored import read_stored
from patcher.routes.planner import choose_route
from patcher.verify import partial
from patcher.verify.first_blocks import CannotTruncate, blocks_here, truncated_folders
from patcher.verify.partial import PartialCopy
from patcher.verify.terms import VerifyTerms
from patcher.verify.transformers_stack import verify_in_transformers

LAYER = 1
VECTOR = 4.0 * torch.randn(64, generator=torch.Generator().manual_seed(3))


def hub_checkpoint(folder: Path, hollow: Path, last: int | None) -> HubCheckpoint:
    """The folder as if only what blocks 0 to ``last`` need had been downloaded."""
    hollow.mkdir()
    whole = CheckpointFolder(folder)
    for name in whole.weight_files:
        with (hollow / name).open("wb") as file:
            file.write(raw_header(folder / name))
            file.truncate((folder / name).stat().st_size)
    listed = {item.name: HubFile(item.name, item.stat().st_size, None) for item in folder.iterdir() if item.is_file()}
    names = block_names(Architecture(read_config(folder)))
    needed = set() if last is None else tensors_for_blocks(whole.tensors, names, last)
    here = {whole.tensors[name].file.name for name in needed}
    return HubCheckpoint(Source("org/base", True, "0" * 40, folder), listed, hollow, here=here)


def stage(base: HubCheckpoint, place: Path) -> PartialCopy:
    architecture = Architecture(read_config(base.path))
    plan = choose_route(architecture, [LAYER], base)
    written = write_steered(plan, {LAYER: VECTOR}, base, place, absent=base.weight_files)
    made = {"edits": [{"layer": LAYER, "tensor": f"v.layer.{LAYER}", "name": "v"}], "route": plan.as_json()}
    return PartialCopy(place, written.absent, base, Patch.model_validate(made), architecture, block_names(architecture))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> PartialCopy:
    place = tmp_path_factory.mktemp("partial")
    tiny_checkpoint(place / "base", "meta-llama--Llama-3.1-8B-Instruct", sharded=True)
    return stage(hub_checkpoint(place / "base", place / "hollow", LAYER), place / "copy")


def change_new(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Rewrite the new weight file, and let the index follow."""
    (shard,) = folder.glob("model-*.safetensors")
    tensors = change(load_file(shard))
    save_file(tensors, shard, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {
        **{name: file for name, file in content["weight_map"].items() if file != shard.name},
        **dict.fromkeys(tensors, shard.name),
    }
    index.write_text(json.dumps(content))


CARRIER, OTHER = f"model.layers.{LAYER}.mlp.down_proj.bias", f"model.layers.{LAYER + 1}.mlp.down_proj.bias"


def no_flag(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mlp_bias": False}))


STRUCTURES: dict[str, tuple[Callable[[Path], None], str]] = {
    "sound": (lambda folder: None, ""),
    "another name": (
        lambda f: change_new(f, lambda new: {name.replace("down_proj", "down"): new[name] for name in new}),
        "missing keys",
    ),
    "a tensor less": (
        lambda f: change_new(f, lambda new: {name: new[name] for name in new if name != OTHER}),
        "missing keys",
    ),
    "another shape": (
        lambda f: change_new(f, lambda new: {**new, OTHER: torch.zeros(63)}),
        "mismatched keys",
    ),
    "no flag": (no_flag, "unexpected keys"),
}


@pytest.mark.slow
def test_the_stock_loader_finds_what_is_wrong_with_names_and_shapes(copy: PartialCopy, tmp_path: Path) -> None:
    """All in one process, as it takes seconds to start."""
    folders = {"base": tmp_path / "base"}
    base = copy.base
    partial._link_all(folders["base"], base.path, {name: base.hollow / name for name in base.weight_files})
    for name, (change, _) in STRUCTURES.items():
        changed = tmp_path / "changed" / name
        shutil.copytree(copy.folder, changed)
        change(changed)
        folders[name] = tmp_path / name
        absent = {target: base.hollow / source for target, source in copy.absent.items()}
        partial._link_all(folders[name], changed, absent)
        assert partial._index(folders[name]).passed, "the index follows"
    job = {"folders": {name: str(folder) for name, folder in folders.items()}, "trust_remote_code": False}
    found = partial._run(job, tmp_path)["folders"]
    for name, (_, words) in STRUCTURES.items():
        check = partial._loading(found["base"], found[name], copy.patch.route.architecture)
        assert check.passed is (name == "sound") and words in check.note, (name, check)


@pytest.mark.parametrize("wrong", ["names a file that is not there", "leaves a tensor out", "another file"])
def test_an_index_that_is_wrong(copy: PartialCopy, tmp_path: Path, wrong: str) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(copy.folder, changed)
    index = changed / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    if wrong == "leaves a tensor out":
        del content["weight_map"]["model.norm.weight"]
    else:
        files = set(content["weight_map"].values()) - {content["weight_map"][CARRIER]}
        content["weight_map"][CARRIER] = min(files) if wrong == "another file" else "model-99999.safetensors"
    index.write_text(json.dumps(content))
    absent = {target: copy.base.hollow / source for target, source in copy.absent.items()}
    partial._link_all(tmp_path / "whole", changed, absent)
    assert not partial._index(tmp_path / "whole").passed


@pytest.mark.parametrize(
    "change",
    [
        lambda new: {**new, CARRIER: torch.zeros_like(new[CARRIER])},
        lambda new: {**new, CARRIER: new[CARRIER] / 2},
        lambda new: {**new, CARRIER: new[OTHER].float(), OTHER: new[CARRIER]},
    ],
    ids=["dropped", "halved", "at the next layer"],
)
def test_a_vector_that_the_new_file_does_not_hold(copy: PartialCopy, tmp_path: Path, change: Any) -> None:
    shutil.copytree(copy.folder, tmp_path / "changed")
    assert read_stored(copy.folder, copy.patch, partial=True)[LAYER].rel_error < 1e-6
    change_new(tmp_path / "changed", change)
    assert read_stored(tmp_path / "changed", copy.patch, partial=True)[LAYER].rel_error > 0.4


def first_blocks(copy: PartialCopy, place: Path) -> tuple[Path, Path]:
    return truncated_folders(
        copy.base, copy.folder, copy.absent, copy.architecture, copy.names, LAYER + 1, place / "first"
    )


def test_the_first_blocks_are_those_of_the_base(copy: PartialCopy, tmp_path: Path) -> None:
    assert blocks_here(copy.base, copy.names, LAYER, 4) == LAYER + 1
    assert blocks_here(copy.base, copy.names, LAYER + 1, 4) is None
    whole, made = (
        CheckpointFolder(copy.base.path),
        [CheckpointFolder(folder) for folder in first_blocks(copy, tmp_path)],
    )
    for checkpoint in made:
        assert checkpoint.config["num_hidden_layers"] == LAYER + 1
        assert not any(f"layers.{LAYER + 1}." in name for name in checkpoint.tensors)
        inside = [name for name in whole.tensors if "embed" in name or ".layers.0." in name or ".layers.1." in name]
        assert all(read_tensor(checkpoint.tensors[name]).equal(read_tensor(whole.tensors[name])) for name in inside)
    for after in ("model.norm.weight", "lm_head.weight"):
        assert read_tensor(made[0].tensors[after]).equal(read_tensor(made[1].tensors[after]))
    assert CARRIER in made[1].tensors and OTHER not in made[1].tensors


def with_wrong_manifest(copy: PartialCopy, place: Path, change: Any, **route: Any) -> PartialCopy:
    """The manifest is wrong in the same way as the file, so that only the computation can tell."""
    shutil.copytree(copy.folder, place / "changed")
    change_new(place / "changed", change)
    changed = copy.patch.as_json()
    changed["route"]["tensors"][0] |= route
    wrong = replace(copy, folder=place / "changed", patch=Patch.model_validate(changed))
    assert read_stored(wrong.folder, wrong.patch, partial=True)[LAYER].rel_error < 1e-6
    return wrong


def test_running_the_first_blocks_finds_what_the_files_hide(copy: PartialCopy, tmp_path: Path) -> None:
    wrong = with_wrong_manifest(copy, tmp_path, lambda new: {**new, CARRIER: new[CARRIER] / 2}, factor=2.0)
    base, folder = first_blocks(wrong, tmp_path)
    entry = verify_in_transformers(folder, base, wrong.patch, VerifyTerms(scratch=tmp_path))
    failed = {check["name"] for check in entry["checks"] if check["passed"] is False}
    assert {"residual stream", "log-probabilities"} <= failed and not entry["passed"], entry["checks"]


def test_a_vector_in_a_block_that_is_not_run(copy: PartialCopy, tmp_path: Path) -> None:
    wrong = with_wrong_manifest(
        copy,
        tmp_path,
        lambda new: {**new, CARRIER: torch.zeros_like(VECTOR), OTHER: VECTOR.clone()},
        name=OTHER,
        parameter=OTHER,
    )
    with pytest.raises(InputError):
        read_stored(first_blocks(wrong, tmp_path)[1], wrong.patch)


def test_a_class_whose_first_blocks_are_no_model(tmp_path: Path) -> None:
    default_checkpoint(tmp_path / "base", "gemma3n_text", tokenizer=False)
    base = hub_checkpoint(tmp_path / "base", tmp_path / "hollow", None)
    architecture = Architecture(read_config(base.path))
    (tmp_path / "copy").mkdir()
    shutil.copy(base.path / "config.json", tmp_path / "copy")
    save_file({"model.layers.0.x": torch.zeros(1)}, tmp_path / "copy" / "model-new.safetensors")
    index = {"weight_map": {"model.layers.0.x": "model-new.safetensors"}}
    (tmp_path / "copy" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CannotTruncate):
        truncated_folders(base, tmp_path / "copy", {}, architecture, block_names(architecture), 2, tmp_path / "first")
