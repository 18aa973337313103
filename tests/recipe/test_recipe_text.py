"""A recipe's text with the choice filled in: as like the original as can be, and always the same recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from patcher.recipe.file import load_recipe, validate_recipe
from patcher.recipe.rewriting import chosen_recipe, moved_text
from patcher.recipe.schema import Recipe
from patcher.recipe.yaml_lines import parse_yaml

BLOCK = """\
# What it is for.
model: ./model   # a folder
vectors:
  - name: first        # stays
    pairs: data/p.json # beside the recipe
    before_layer: 3    # as ActAdd counts
  - name: love
    pairs: data/p.json
    layer:             # one of these
      - 3  # early
      - 5  # late
    # how much of it
    coefficient: auto  # to be found
evaluate: {on_topic: data/on.txt, neutral: data/on.txt, guard: {kl: null}}
output: ./out
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes") / "here"
    (folder / "model").mkdir(parents=True)
    (folder / "data").mkdir()
    (folder / "data" / "p.json").write_text("[]")
    (folder / "data" / "on.txt").write_text("x")
    return folder


def filled(text: str, folder: Path, to: Path, vector: int, layer: int, coefficient: float, *sets: str) -> str:
    """The new text, which is the wanted recipe, from the other folder."""
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    to.mkdir(parents=True, exist_ok=True)
    loaded = load_recipe(path, sets)
    after = chosen_recipe(loaded.recipe, vector, layer, coefficient)
    found = moved_text(loaded, after, to)
    new = validate_recipe(parse_yaml(found, "new"))
    assert with_real_paths(new, to) == with_real_paths(after, folder)
    return found


def with_real_paths(recipe: Recipe, folder: Path) -> Any:
    def real(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: real(value) for key, value in node.items()}
        if isinstance(node, list):
            return [real(value) for value in node]
        known = isinstance(node, str) and node and "\0" not in node and len(node) < 200 and (folder / node).exists()
        return str((folder / node).resolve()) if known else node

    data = recipe.model_dump(mode="json")
    # Relative to the working directory, not to the recipe.
    return {key: value if key == "output" else real(value) for key, value in data.items()}


def test_comments_stay_and_paths_point_at_the_same_files(folder: Path) -> None:
    found = filled(BLOCK, folder, folder.parent / "there" / "deep", 1, 5, -0.5)
    assert (
        found
        == """\
# What it is for.
model: "../../here/model"   # a folder
vectors:
  - name: first        # stays
    pairs: "../../here/data/p.json" # beside the recipe
    before_layer: 3    # as ActAdd counts
  - name: love
    pairs: "../../here/data/p.json"
    layer: 5  # late
    # how much of it
    coefficient: -0.5  # to be found
evaluate: {on_topic: "../../here/data/on.txt", neutral: "../../here/data/on.txt", guard: {kl: null}}
output: ./out
"""
    )


def test_before_layer_becomes_layer_and_the_embedding_stays_before_layer(folder: Path) -> None:
    found = filled(BLOCK, folder, folder / "to", 0, 7, 2.0)
    assert "    layer: 7\n    coefficient: 2.0    # as ActAdd counts\n" in found
    found = filled(BLOCK, folder, folder / "to", 1, -1, 2.0)
    assert "    before_layer: 0  # late\n" in found and "layer: [" not in found
    assert load(found).vectors[1].before_layer == 0


def load(text: str) -> Recipe:
    return validate_recipe(parse_yaml(text, "new"))


@pytest.mark.parametrize(
    "vector",
    [
        "{name: v, pairs: data/p.json, layer: auto, coefficient: auto}",
        "{layer: auto, name: v, pairs: data/p.json}",
        '{"before_layer": [0, 2], "coefficient": "auto", "name": "v", "pairs": "data/p.json"}',
        "{pairs: [{positive: a, negative: b}], name: v, layer: [1, 2],\n     coefficient: auto,}",
    ],
)
def test_flow_style(folder: Path, vector: str) -> None:
    found = filled(f"model: model\nvectors: [{vector}] # mine\n", folder, folder.parent, 0, 4, 1e-7)
    assert found.rstrip().endswith("# mine") and load(found).vectors[0].coefficient == 1e-7


def test_what_was_set_on_the_command_line_is_in_it(folder: Path) -> None:
    found = filled(BLOCK, folder, folder / "to", 1, 5, 1.0, "seed=3", "vectors.1.limit=12")
    new = load(found)
    assert "#" not in found and new.seed == 3 and new.vectors[1].limit == 12 and new.evaluate.guard.kl is None
    # Where only what is filled in was set, the text can stay.
    assert "# stays" in filled(BLOCK, folder, folder / "to", 1, 5, 1.0, "vectors.1.coefficient=2")


def test_hub_names_and_absolute_paths_stay(folder: Path) -> None:
    there = folder / "data" / "p.json"
    first = f"model: me/gpt2@main\nvectors:\n- {{pairs: {there}, layer: 1}}\n"
    text = first + "- {name: b, pairs: hf://datasets/a/b, layer: 2}\n"
    found = filled(text, folder, folder.parent / "else", 1, 3, 1.0)
    assert found.startswith(first)
    assert "pairs: hf://datasets/a/b, layer: 3, coefficient: 1.0}" in found


def test_a_folder_reached_through_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "deeper")
    found = filled(BLOCK, folder, tmp_path / "link", 1, 5, 1.0)
    assert ((tmp_path / "link").resolve() / load(found).model).resolve() == folder / "model"


words = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
coefficients = st.floats(-1e6, 1e6).filter(lambda value: value != 0)
specs = st.fixed_dictionaries(
    {"pairs": st.sampled_from(["data/p.json", [{"positive": "a", "negative": ""}]])},
    optional={
        "coefficient": st.one_of(st.just("auto"), coefficients),
        "system_prompt": words,
        "limit": st.integers(1, 9),
    },
).flatmap(
    lambda spec: st.sampled_from(
        [{"layer": "auto"}, {"layer": [1, "50%"]}, {"before_layer": [0, 4]}, {"before_layer": 2}, {"layer": "40%"}]
    ).map(lambda place: {**spec, **place})
)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    swept=specs,
    coefficient=coefficients,
    layer=st.integers(-1, 90),
    prompts=st.lists(words, max_size=2),
    flow=st.sampled_from([None, True, False]),
)
def test_every_recipe_comes_out_as_wanted(
    folder: Path, data: Any, swept: dict[str, Any], coefficient: float, layer: int, prompts: list[str], flow: Any
) -> None:
    other = {"name": "other", "pairs": "data/p.json", "before_layer": 1}
    place = data.draw(st.integers(0, 1))
    vectors = [swept, other] if place == 0 else [other, swept]
    recipe = {"model": "./model", "vectors": vectors, "evaluate": {"on_topic": "data/on.txt", "prompts": prompts}}
    if data.draw(st.booleans()):
        text = json.dumps(recipe, ensure_ascii=data.draw(st.booleans()), indent=data.draw(st.sampled_from([None, 2])))
    else:
        text = yaml.safe_dump(recipe, default_flow_style=flow, allow_unicode=data.draw(st.booleans()), width=40)
    try:
        validate_recipe(parse_yaml(text, "x"))
    except Exception:
        return  # no YAML of these characters, which is somebody else's test
    filled(text, folder, folder.parent / "to", place, layer, coefficient)
