"""Recipes of models that are here by their shape alone are built, and proven, on a tiny random model of that shape."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.building import build_recipe
from support.families import family_base
from support.tiny_wrappers import wrapper_checkpoint
from test_recipe_plans import BUILT, RECIPE_OF
from test_recipes import SHRUNK, name_of

from patcher.recipe.pairs import InlinePair

ROUTES = {
    "mistralai/Mistral-Small-3.2-24B-Instruct-2506": "relabel",
}
"""The others take the carrier."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Model of a recipe -> folder of its stand-in."""

    def make(model: str) -> Path:
        folder, shape = tmp_path_factory.mktemp("base") / "base", SHRUNK[model]
        if isinstance(shape, str):
            return wrapper_checkpoint(folder, shape)
        family_base(shape, folder)
        return folder

    return make


@pytest.mark.slow_but("current/gemma-3-4b-*", "current/mistral-*")
@pytest.mark.parametrize("path", BUILT, ids=name_of)
def test_it_is_built_and_proven(path: Path, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = RECIPE_OF[path]
    base = tiny(recipe.model)
    # A random model says nothing that could be measured.
    result = build_recipe(path, tmp_path / "out", f"model={base}", "evaluate={enabled: false}")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    blocks = config.get("text_config", config)["num_hidden_layers"]
    (vector,) = recipe.vectors
    assert isinstance(vector.layer, str)
    manifest = result.patch
    assert [edit.layer for edit in manifest.edits] == [int(vector.layer.rstrip("%")) * blocks // 100]
    assert manifest.route.name == ROUTES.get(recipe.model, "carrier") and manifest.route.exact
    assert [(check.stack, check.passed) for check in manifest.verification] == [("transformers", True)]
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["model_type"] == config["model_type"]
    )


def test_the_families_that_people_use_have_one() -> None:
    shapes = [SHRUNK[RECIPE_OF[path].model] for path in BUILT]
    models = {shape if isinstance(shape, str) else shape.model_type for shape in shapes}
    assert models >= {"gemma3", "mistral3", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "internvl", "glm4v_moe", "kimi_k25"}
    assert models >= {"gemma4", "gemma4_moe", "gemma4_e2b", "deepseek_v4"}


def test_their_pairs_have_two_sides_that_differ() -> None:
    for path in BUILT:
        (vector,) = RECIPE_OF[path].vectors
        assert isinstance(vector.pairs, str)
        file = path.parent / vector.pairs
        pairs = [InlinePair(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
        assert all(pair.prompt and pair.positive != pair.negative for pair in pairs)
        assert all((file.parent / pair.image).is_file() for pair in pairs if pair.image is not None)
