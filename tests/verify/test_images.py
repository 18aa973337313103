"""A copy of a class that takes images is proven with an image as well, and that part of the proof can fail alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_wrappers import image_inputs, released_wrappers, tiny_wrapper, wrapper_checkpoint
from support.unverified import PROBES, patch

from patcher.patched.schema import Patch
from patcher.patched.stored import read_stored
from patcher.recipe.schema import VerifySpec
from patcher.verify import transformers_stack
from patcher.verify.comparison import Run, compare
from patcher.verify.terms import VerifyTerms
from patcher.verify.transformers_stack import verify_in_transformers

TERMS = VerifyTerms(VerifySpec(probes=list(PROBES)))
OWN, ALONE, RANDOM = "its own processor", "its own image processor", "random pixel values"
COMPUTED = {"image log-probabilities", "image left padding", "image greedy decoding with a cache"}
BROKEN = {"llama4"}
"""Their forward pass fails in the installed release, whatever it is given."""


def checks(entry: dict[str, Any], passed: bool) -> set[str]:
    return {check["name"] for check in entry["checks"] if check["passed"] is passed}


Made = Callable[..., tuple[Path, Path, Patch]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """``made(name)``: a base, its copy, and what the manifest says of it; each made once."""
    known: dict[tuple[str, bool], tuple[Path, Path, Patch]] = {}

    def get(name: str, *, processor: bool = True) -> tuple[Path, Path, Patch]:
        if (name, processor) not in known:
            place = tmp_path_factory.mktemp(name)
            base = wrapper_checkpoint(place / "base", name, processor=processor)
            manifest = patch(base, place / "copy", 1)
            known[name, processor] = base, place / "copy", Patch.model_validate(manifest)
        return known[name, processor]

    return get


@pytest.fixture(scope="module")
def proven(made: Made) -> tuple[Run, Run, dict[str, Any]]:
    """The runs of a LLaVA and its copy, and the entry that they gave."""
    base, copy, manifest = made("llava")
    runs: list[Run] = []
    entry = verify_in_transformers(copy, base, manifest, TERMS, keep=lambda *both: runs.extend(both))
    return runs[0], runs[1], entry


def test_an_image_goes_through_the_folders_own_processor(proven: tuple[Run, Run, dict[str, Any]]) -> None:
    reference, _, entry = proven
    assert entry["passed"] and {*COMPUTED, "image prompt", "image share of the effect"} <= checks(entry, True)
    images = entry["images"]
    assert images["checked"] and images["by"] == OWN and images["why"] == ""
    assert images["max_abs_logprob_diff"] <= images["tolerance"] < images["steering_effect"]
    # All positions, placeholders included; what they hold changes what comes behind them.
    assert reference.tensors["image hook/0"].shape[0] == images["positions"] == len(reference.facts["image"]["ids"])
    assert entry["causal_lm"] == {"does": "refuses", "architecture": None}


@pytest.mark.parametrize("name", sorted(released_wrappers().keys() - BROKEN))
def test_a_fixture_reads_its_image(tmp_path: Path, name: str) -> None:
    model = tiny_wrapper(name, tmp_path)
    with torch.no_grad():
        one, other = (model(**image_inputs(model, seed=seed)).logits for seed in (1, 2))
    assert torch.isfinite(one).all() and (one - other).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "processor", "by", "causal"),
    [
        ("gemma3", True, OWN, "whole"),
        ("qwen2_5_vl", True, ALONE, "refuses"),
        ("qwen3_5", False, RANDOM, "text"),
        ("glm4v", False, RANDOM, "refuses"),
    ],
)
def test_what_made_the_image_and_what_causal_lm_loads_is_said(
    made: Made, name: str, processor: bool, by: str, causal: str
) -> None:
    base, copy, manifest = made(name, processor=processor)
    entry = verify_in_transformers(copy, base, manifest, TERMS)
    assert entry["passed"] and checks(entry, True) >= COMPUTED
    # A torchvision that is installed lets every processor be loaded.
    assert entry["images"]["by"] in ({by} if by != ALONE else {ALONE, OWN})
    assert str(copy) not in json.dumps(entry["images"])
    assert entry["causal_lm"]["does"] == causal
    assert (causal == "text") is any(check.startswith("text part alone") for check in checks(entry, True))


def held_to(reference: Run, candidate: Run, made: Made) -> dict[str, Any]:
    _, copy, manifest = made("llava")
    result = compare(
        reference,
        candidate,
        read_stored(copy, manifest),
        architecture=manifest.route.architecture,
        tolerance=TERMS.spec.tolerance,
        long_note="no sliding window",
    )
    return result.entry("transformers", None, "passed" if result.passed else "failed", "a hook")


def without_the_vector_at_images(tensors: dict[str, torch.Tensor], reference: Run) -> None:
    tensors["image candidate/0"] = reference.tensors["image base/0"]


def wrong_with_padding(tensors: dict[str, torch.Tensor], _reference: Run) -> None:
    tensors["image left_padding"] = tensors["image left_padding"] + 1e-3


def wrong_with_a_cache(tensors: dict[str, torch.Tensor], _reference: Run) -> None:
    tensors["image greedy"] = tensors["image greedy"].flip(-1)


def slightly_wrong(tensors: dict[str, torch.Tensor], _reference: Run) -> None:
    tensors["image candidate/0"] = tensors["image candidate/0"] + 2e-4


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without_the_vector_at_images, {"image log-probabilities", "image share of the effect"}),
        (slightly_wrong, {"image log-probabilities"}),
        (wrong_with_padding, {"image left padding"}),
        (wrong_with_a_cache, {"image greedy decoding with a cache"}),
    ],
)
def test_what_is_wrong_with_an_image_alone_fails(
    proven: tuple[Run, Run, dict[str, Any]], made: Made, change: Callable[..., None], expected: set[str]
) -> None:
    reference, candidate, _ = proven
    assert held_to(reference, candidate, made)["passed"]
    tensors = dict(candidate.tensors)
    change(tensors, reference)
    entry = held_to(reference, Run(tensors, candidate.facts), made)
    assert entry["status"] == "failed" and checks(entry, False) == expected


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor], str], None]) -> None:
    """Change the file that holds the tensor whose name ends so."""
    for file in folder.glob("model-*.safetensors"):
        tensors = load_file(file)
        for found in [one for one in tensors if one.endswith(name)]:
            change(tensors, found)
            save_file(tensors, file, {"format": "pt"})


def change_the_projector(folder: Path) -> None:
    def louder(tensors: dict[str, torch.Tensor], name: str) -> None:
        tensors[name] = 1.5 * tensors[name]

    edit_tensors(folder, "multi_modal_projector.linear_1.weight", louder)


def move_to_the_next_block(folder: Path) -> None:
    def swap(tensors: dict[str, torch.Tensor], name: str) -> None:
        other = name.replace("layers.1.", "layers.2.")
        tensors[name], tensors[other] = tensors[other], tensors[name]

    edit_tensors(folder, "layers.1.mlp.down_proj.bias", swap)


def drop_the_processor(folder: Path) -> None:
    for file in released_wrappers()["llava"]["files"]:
        (folder / file).unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "fails", "holds"),
    [
        (change_the_projector, {"image log-probabilities"}, {"log-probabilities", "residual stream"}),
        (move_to_the_next_block, {"image log-probabilities", "stored vector"}, {"image prompt"}),
        (drop_the_processor, {"image prompt"}, {"log-probabilities"}),
        (lambda folder: edit_json(folder / "preprocessor_config.json", image_std=[0.4] * 3), {"image prompt"}, set()),
    ],
)
def test_a_broken_folder_fails(
    made: Made, tmp_path: Path, change: Callable[[Path], None], fails: set[str], holds: set[str]
) -> None:
    base, copy, manifest = made("llava")
    shutil.copytree(copy, tmp_path / "copy")
    change(tmp_path / "copy")
    entry = verify_in_transformers(tmp_path / "copy", base, manifest, TERMS)
    assert entry["status"] == "failed"
    assert fails <= checks(entry, False) and holds <= checks(entry, True), entry["checks"]


@pytest.mark.slow
def test_an_image_is_run_where_the_model_does_not_fit_in_memory(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    base, copy, manifest = made("llava")
    monkeypatch.setattr(transformers_stack, "available_memory", lambda: 200_000)
    entry = verify_in_transformers(copy, base, manifest, TERMS)
    assert entry["passed"] and {"image log-probabilities", "image left padding"} <= checks(entry, True), entry["checks"]
    assert entry["images"]["by"] == OWN
