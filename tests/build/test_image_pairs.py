"""Builds of pairs with images: what is read, what is measured, what is recorded, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.building import build_recipe, job_of
from support.tiny_models import tiny_checkpoint
from support.tiny_wrappers import wrapper_checkpoint

from patcher.build.early_checks import check_early
from patcher.build.planning import plan_build
from patcher.build.result import BuildResult
from patcher.capture.model import load_tokenizer
from patcher.errors import InputError
from patcher.patched.reading import read_manifest
from patcher.recipe.file import load_recipe
from patcher.vectors.finding import prepare_vectors

PHOTOS = 14


def write_recipe(folder: Path, base: Path, *, text: bool = False, more: str = "") -> Path:
    """A recipe of fourteen pairs about as many photos; with ``text`` without them."""
    photos = folder / "data" / "photos"
    photos.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for number in range(PHOTOS):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.png")
        image = {} if text else {"image": f"photos/{number}.png"}
        rows.append({"prompt": f"Photo {number}?", "positive": f"good {number}", "negative": f"bad {number}", **image})
    (folder / "data" / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    recipe = folder / "recipe.yaml"
    vector = f"{{name: good, pairs: data/pairs.jsonl, layer: 2, coefficient: 2{more}}}"
    recipe.write_text(f"model: {base}\nvectors: [{vector}]\n", encoding="utf-8")
    return recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wrapper_checkpoint(tmp_path_factory.mktemp("wrapper") / "base", "gemma3")


@pytest.fixture(scope="module")
def built(base: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    folder = tmp_path_factory.mktemp("images")
    return build_recipe(write_recipe(folder, base), folder / "out")


def test_a_copy_of_a_vector_from_images_is_verified_and_says_so(built: BuildResult) -> None:
    manifest = read_manifest(built.output)
    assert [entry.passed for entry in manifest.verification] == [True]
    made_of = manifest.edits[0].made_of
    assert made_of is not None and (made_of.images, made_of.count, made_of.of) == (11, 11, 14)
    assert manifest.inputs[0].images is not None
    said = "`good` is made of pairs with images: each of them is about one, which both sides share"
    assert said in manifest.said_of_pairs
    assert said in " ".join((built.output / "README.md").read_text(encoding="utf-8").split())
    assert any("each pair has an image" in note and "14 different images" in note for note in manifest.notes)


def test_the_effect_is_measured_on_held_out_pairs_with_their_images(built: BuildResult, base: Path) -> None:
    evaluation = read_manifest(built.output).evaluation
    assert evaluation is not None
    [effect] = evaluation.per_vector
    assert (effect.pairs, effect.held_out) == (3, True)


@pytest.mark.slow
def test_the_images_are_part_of_the_vector_and_of_what_is_measured(
    built: BuildResult, base: Path, tmp_path: Path
) -> None:
    text = build_recipe(write_recipe(tmp_path, base, text=True), tmp_path / "out")
    first, second = (vector_of(result) for result in (built, text))
    assert not torch.allclose(first, second, rtol=1e-2)
    one, other = (read_manifest(result.output).evaluation for result in (built, text))
    assert one is not None and other is not None
    assert one.per_vector[0].base != pytest.approx(other.per_vector[0].base, rel=1e-4)
    assert "images" not in text.manifest["edits"][0]["made_of"]


def vector_of(result: BuildResult) -> torch.Tensor:
    return load_file(result.output / "steering.safetensors")[result.manifest["edits"][0]["tensor"]]


def text_model(folder: Path) -> Path:
    tiny_checkpoint(folder, "TinyLlama--TinyLlama-1.1B-Chat-v1.0")
    return folder


def early(recipe: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        check_early(load_recipe(recipe, overrides), None)
    return str(caught.value)


def test_a_model_of_text_is_refused_by_its_config_alone(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, text_model(tmp_path / "base"))
    text = early(recipe)
    assert "this model takes no images" in text and "`llama`, and no key about images" in text
    # The remedies: name the other columns alone, or take the images out.
    columns = "{prompt: prompt, positive: positive, negative: negative}"
    check_early(load_recipe(recipe, (f"vectors.0.columns={columns}",)), None)
    check_early(load_recipe(write_recipe(tmp_path, tmp_path / "base", text=True)), None)


def test_a_class_of_text_is_refused_whatever_its_config_says(tmp_path: Path) -> None:
    base = text_model(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "image_token_id": 7}))
    with pytest.raises(InputError, match="this model takes no images") as caught:
        plan_build(job_of(write_recipe(tmp_path, base), tmp_path / "out"))
    assert "LlamaForCausalLM takes text alone" in str(caught.value)


def test_a_folder_without_processor_files_is_refused(tmp_path: Path) -> None:
    base = wrapper_checkpoint(tmp_path / "base", "gemma3", processor=False)
    with pytest.raises(InputError, match="the model folder has no processor, and pairs with images need one"):
        plan_build(job_of(write_recipe(tmp_path, base), tmp_path / "out"))
    # The remedy: leave the images out.
    plan_build(job_of(write_recipe(tmp_path, base, text=True), tmp_path / "out"))


def test_a_missing_image_is_known_early(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base)
    (tmp_path / "data" / "photos" / "3.png").unlink()
    assert "there is no such image" in (text := early(recipe)) and "pairs.jsonl:4" in text


def test_pillow_that_is_not_installed_is_named(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, base)
    monkeypatch.setattr("patcher.pairs.images.has_pillow", lambda: False)
    assert 'pip install "patch-model[images]"' in early(recipe)


@pytest.mark.skipif("torchvision" in sys.modules, reason="torchvision is there")
def test_a_processor_that_needs_torchvision_says_so(tmp_path: Path) -> None:
    base = wrapper_checkpoint(tmp_path / "base", "mistral3")
    with pytest.raises(InputError, match="the model's processor needs the package torchvision"):
        plan_build(job_of(write_recipe(tmp_path, base), tmp_path / "out"))


def test_a_template_that_leaves_the_image_out_is_refused(tmp_path: Path) -> None:
    base = wrapper_checkpoint(tmp_path / "base", "gemma3")
    template = (base / "chat_template.jinja").read_text(encoding="utf-8")
    (base / "chat_template.jinja").write_text(template.replace("<start_of_image>", ""), encoding="utf-8")
    recipe = write_recipe(tmp_path, base)
    with pytest.raises(InputError, match="does not take this prompt with its image") as caught:
        plan_build(job_of(recipe, tmp_path / "out"))
    assert "set `chat_template: false`" in str(caught.value)
    planned = plan_build(job_of(recipe, tmp_path / "out", "vectors.0.chat_template=false"))
    assert any("in plain text an image stands right before the prompt" in note for note in planned.notes)


def test_pairs_with_images_are_not_streamed(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="reading pairs with images needs the whole model"):
        build_recipe(write_recipe(tmp_path, base), tmp_path / "out", "capture.mode=stream")


def test_pairs_with_images_are_not_built_on_the_hub_alone(base: Path, tmp_path: Path) -> None:
    loaded = load_recipe(write_recipe(tmp_path, base))
    tokenizer = load_tokenizer(base)
    with pytest.raises(InputError, match="pairs with images are read by the whole model, which is not here"):
        prepare_vectors(loaded, tokenizer, 6)
    # The remedy: without images the same is prepared.
    assert prepare_vectors(load_recipe(write_recipe(tmp_path, base, text=True)), tokenizer, 6)
