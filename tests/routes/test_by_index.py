"""An inserted block in a class that adds features of an image behind its blocks by their index (DeepStack)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.tiny_wrappers import wrapper_checkpoint
from support.unverified import PROBES, patch
from support.writing import write_steered

from patcher.architectures.analysis import Architecture
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.prepare import read_config
from patcher.errors import InputError
from patcher.patched.schema import Patch
from patcher.recipe.schema import VerifySpec
from patcher.routes.carrier import route
from patcher.routes.carrier.by_index import _indexes_of_zeros, added_by_index, find_features
from patcher.routes.planner import choose_route
from patcher.verify.terms import VerifyTerms
from patcher.verify.transformers_stack import verify_in_transformers

KEY = "vision_config.deepstack_visual_indexes"
TERMS = VerifyTerms(VerifySpec(probes=list(PROBES)))


def failed(entry: dict[str, Any]) -> set[str]:
    return {check["name"] for check in entry["checks"] if check["passed"] is False}


def planned(base: Path, layers: list[int]) -> Any:
    return choose_route(Architecture(read_config(base)), layers, CheckpointFolder(base), route="carrier")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wrapper_checkpoint(tmp_path_factory.mktemp("deepstack") / "base", "qwen3_vl", embedding_rms=1.0)


def test_the_class_and_its_config_say_what_is_added_where(base: Path) -> None:
    architecture = Architecture(read_config(base))
    assert added_by_index(architecture) == "deepstack_visual_embeds"
    features = find_features(architecture)
    assert features is not None and (features.key, features.indexes) == (KEY, (1, 3))
    assert features.modules == "model.visual.deepstack_merger_list"
    assert {"norm.weight", "linear_fc1.weight", "linear_fc2.bias"} <= features.leaves.keys()


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl", "mistral3"])
def test_other_classes_add_nothing(tmp_path: Path, name: str) -> None:
    wrapper_checkpoint(tmp_path / "base", name)
    assert added_by_index(Architecture(read_config(tmp_path / "base"))) is None


@pytest.mark.parametrize(
    ("indexes", "places", "zeros"),
    [
        ((8, 16, 24), (0, 1, 2), []),
        ((8, 16, 24), (0, 2, 3), [9]),
        ((8, 16, 24), (1, 2, 4), [0, 17]),
        ((8, 16, 24), (0, 3, 4), [9, 10]),
        ((1, 2), (0, 2), None),
        ((0, 5), (1, 2), None),
    ],
)
def test_a_zero_comes_between_the_features(
    indexes: tuple[int, ...], places: tuple[int, ...], zeros: list[int] | None
) -> None:
    assert _indexes_of_zeros(indexes, places) == zeros


def test_a_block_before_the_last_feature_comes_with_a_merger_of_zeros(base: Path) -> None:
    plan = planned(base, [0])
    assert plan.config_changes[KEY] == [1, 3, 2]
    zeros = [tensor for tensor in plan.tensors if "deepstack_merger_list.2." in tensor.name]
    assert zeros and all(tensor.make is None and tensor.layer is None for tensor in zeros)
    # Behind the last feature nothing moves.
    later = planned(base, [1])
    assert KEY not in later.config_changes and not [one for one in later.tensors if "merger" in one.name]


def test_features_with_no_place_between_them_are_a_reason(tmp_path: Path) -> None:
    base = wrapper_checkpoint(tmp_path / "base", "qwen3_vl")
    config = json.loads((base / "config.json").read_text())
    config["vision_config"]["deepstack_visual_indexes"] = [1, 2]
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="insert behind block 1 or a later one") as caught:
        planned(base, [0])
    assert "`deepstack_visual_embeds`" in str(caught.value)
    assert planned(base, [1]).route == "carrier"


@pytest.mark.slow
@pytest.mark.parametrize("layers", [[0], [0, 1]])
def test_text_and_images_are_as_under_the_hook(base: Path, tmp_path: Path, layers: list[int]) -> None:
    plan = planned(base, layers)
    vectors = {layer: 0.5 * torch.randn(64, generator=torch.Generator().manual_seed(layer)) for layer in layers}
    write_steered(plan, vectors, CheckpointFolder(base), tmp_path / "copy")
    edits = [{"name": "v", "layer": layer, "tensor": f"v.layer.{layer}"} for layer in layers]
    manifest = Patch.model_validate({"route": plan.as_json(), "edits": edits})
    entry = verify_in_transformers(tmp_path / "copy", base, manifest, TERMS)
    assert entry["passed"] and entry["images"]["checked"], entry["checks"]
    with safe_open(next((tmp_path / "copy").glob("*-00002-of-*.safetensors")), "pt") as file:
        assert any("deepstack_merger_list.2.linear_fc2.bias" in name for name in file.keys())  # noqa: SIM118


@pytest.mark.slow
def test_without_the_zeros_the_text_is_right_and_the_image_is_wrong(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(route, "feature_changes", lambda *_given: ({}, []))
    manifest = patch(base, tmp_path / "copy", 0)
    entry = verify_in_transformers(tmp_path / "copy", base, Patch.model_validate(manifest), TERMS)
    assert entry["status"] == "failed"
    assert failed(entry) and all(name.startswith("image ") for name in failed(entry)), entry["checks"]
