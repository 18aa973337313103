"""The whole way: a recipe that aims at all stacks is verified in each of them, and the folder says so."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from support.building import build_recipe
from support.stack_runs import environment

from patcher.demo.write import write_demo
from patcher.verify.later import verify_folder_in

STACKS = ["transformers", "vllm", "llama.cpp"]

pytestmark = [pytest.mark.slow, pytest.mark.stacks]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's model, built for all stacks."""
    for stack in STACKS:
        environment(stack)
    place = tmp_path_factory.mktemp("stacks")
    path = write_demo(place / "demo")
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe |= {"targets": STACKS, "verify": {"stacks": "installed"}}
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    build_recipe(path, place / "out")
    return place / "out"


def test_the_folder_records_every_stack(folder: Path) -> None:
    manifest = json.loads((folder / "steering.json").read_text(encoding="utf-8"))
    entries = {entry["stack"]: entry for entry in manifest["verification"]}
    assert list(entries) == STACKS and all(entry["passed"] for entry in entries.values())
    for stack in STACKS[1:]:
        entry = entries[stack]
        assert entry["max_abs_logprob_diff"] <= 1e-4 and entry["steering_effect"] > 1
        assert entry["gain"] == pytest.approx(1, abs=1e-3) and entry["positions"] > 100
        assert {check["name"] for check in entry["checks"] if check["passed"]} >= {
            "loading", "log-probabilities", "share of the effect", "gain", "greedy decoding with a cache"
        }  # fmt: skip
    assert re.fullmatch(r"\d+\.\d+.*", entries["vllm"]["version"])
    assert re.fullmatch(r"b\d+", entries["llama.cpp"]["version"])
    assert str(folder) not in json.dumps(manifest["verification"])


def test_the_card_records_every_stack(folder: Path) -> None:
    card = (folder / "README.md").read_text(encoding="utf-8")
    for stack in STACKS:
        assert re.search(rf"\| {re.escape(stack)} \| yes \|.*passed \(.+\)", card), card


def test_a_folder_with_half_of_its_vector_fails_in_every_stack(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    manifest = json.loads((broken / "steering.json").read_text(encoding="utf-8"))
    names = {tensor["name"] for tensor in manifest["route"]["tensors"]}
    for path in broken.glob("model*.safetensors"):
        tensors = load_file(path)
        changed = {name: tensors[name] / 2 for name in names & tensors.keys()}
        save_file({**tensors, **changed}, path, {"format": "pt"})
    for entry in verify_folder_in(broken, STACKS[1:]):
        assert entry["status"] == "failed", entry
        (stored,) = [check for check in entry["checks"] if check["name"] == "stored vector"]
        assert stored["passed"] is False


def test_a_stack_that_drops_the_bias_is_caught(folder: Path, tmp_path: Path) -> None:
    """The tensors are there, but nothing tells the class to read them: the silent loss."""
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    config = json.loads((broken / "config.json").read_text(encoding="utf-8"))
    (broken / "config.json").write_text(json.dumps({**config, "mlp_bias": False}), encoding="utf-8")
    (entry,) = verify_folder_in(broken, ["vllm"])
    failed = {check["name"] for check in entry["checks"] if check["passed"] is False}
    assert entry["status"] == "failed" and {"log-probabilities", "gain"} <= failed
    assert entry["gain"] == pytest.approx(0, abs=0.05)
