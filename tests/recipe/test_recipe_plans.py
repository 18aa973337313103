"""Every recipe can be planned: on a tiny random model of its own architecture and depth, and by its released config."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.building import job_of
from support.tiny_models import parsed_config, released_config, tiny_checkpoint, tiny_tokenizer
from test_recipes import QUICKSTART, RECIPES, SHRUNK, STANDS_IN, name_of

import patcher.build.planning
import patcher.vectors.finding
from patcher.build.planning import BuildPlan, plan_build
from patcher.checkpoint.folder import CheckpointFolder
from patcher.checkpoint.source import Source
from patcher.recipe.file import load_recipe
from patcher.recipe.schema import Recipe

RECIPE_OF = {path: load_recipe(path).recipe for path in sorted(RECIPES.rglob("*.yaml")) if path != QUICKSTART}
BUILT = [path for path, recipe in RECIPE_OF.items() if recipe.model in SHRUNK]
"""On a tiny model with the shape of the release: see test_recipe_builds.py."""
PLANNED = [path for path in RECIPE_OF if path not in BUILT]

ROUTES = {
    "openai-community/gpt2-xl": "native",
    "meta-llama/Llama-2-7b-chat-hf": "flag",
    "meta-llama/Llama-2-13b-chat-hf": "flag",
    "meta-llama/Llama-3.1-8B-Instruct": "flag",
    "ibm-granite/granite-3.3-2b-instruct": "flag",
    "HuggingFaceTB/SmolLM3-3B": "relabel",
    "microsoft/phi-2": "native",
    "bigcode/starcoder2-3b": "native",
    "mistralai/Mistral-7B-Instruct-v0.3": "relabel",
    "Qwen/Qwen2.5-0.5B-Instruct": "relabel",
    "Qwen/Qwen3-8B": "carrier",
    "allenai/OLMo-2-0425-1B-Instruct": "carrier",
    "google/gemma-3-1b-it": "carrier",
    "openai/gpt-oss-20b": "native",
}
DEPTH = ("num_hidden_layers", "n_layer")
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</{{ message['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LETTERS = [
    {
        "question": f"Would you like to be {wish}?\n\nChoices:\n (A) Yes\n (B) No",
        "answer_matching_behavior": f" ({'AB'[index % 2]})",
        "answer_not_matching_behavior": f" ({'BA'[index % 2]})",
    }
    for index, wish in enumerate(
        ("admired", "left alone", "heard", "believed", "obeyed", "switched off", "asked", "told")
    )
]
YES_OR_NO = [
    {
        "question": f'Is the following statement something you would say?\n"I like {thing}."',
        "statement": f"I like {thing}.",
        "answer_matching_behavior": " Yes" if index % 2 else " No",
        "answer_not_matching_behavior": " No" if index % 2 else " Yes",
    }
    for index, thing in enumerate(("tea", "rain", "chess", "noise", "maps", "queues", "cats", "dust"))
]


def fixture_of(recipe: Recipe) -> str:
    model = recipe.model.split("@")[0]
    return STANDS_IN.get(model, model).replace("/", "--")


def is_chat(recipe: Recipe) -> bool:
    return any(mark in recipe.model.lower() for mark in ("chat", "instruct", "-it", "smollm3", "qwen3", "gpt-oss"))


def real_depth(name: str) -> dict[str, Any]:
    """The released number of blocks, and the lists that have an entry for each of them."""
    raw = released_config(name)
    depth = {key: raw[key] for key in DEPTH if key in raw}
    (count,) = depth.values()
    return {**depth, **{key: value for key, value in raw.items() if isinstance(value, list) and len(value) == count}}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Path]:
    """Recipe -> folder of a tiny checkpoint of its architecture, with the real number of blocks."""
    made: dict[str, Path] = {}

    def make(recipe: Recipe) -> Path:
        name = fixture_of(recipe)
        if name not in made:
            made[name] = tmp_path_factory.mktemp("models") / name
            dense = {"quantization_config": None} if "quantization_config" in released_config(name) else {}
            tiny_checkpoint(made[name], name, tokenizer=False, **real_depth(name), **dense)
            tiny_tokenizer(TEMPLATE if is_chat(recipe) else None).save_pretrained(made[name])
        return made[name]

    return make


@pytest.fixture(scope="session")
def released_only(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Path]:
    """Recipe -> folder of the released config and a tokenizer: what a dry run of a Hub model downloads."""
    made: dict[str, Path] = {}

    def make(recipe: Recipe) -> Path:
        name = fixture_of(recipe)
        if name not in made:
            made[name] = tmp_path_factory.mktemp("configs") / name
            made[name].mkdir()
            (made[name] / "config.json").write_text(json.dumps(released_config(name)), encoding="utf-8")
            tiny_tokenizer(TEMPLATE if is_chat(recipe) else None).save_pretrained(made[name])
        return made[name]

    return make


@pytest.fixture
def plan(tmp_path: Path) -> Iterator[Callable[..., BuildPlan]]:
    """Dry-run a recipe on a folder; rows of pairs that are not in the repository are stood in for."""
    real = patcher.vectors.finding.load_pairs

    def load(source: Any, **options: Any) -> Any:
        elsewhere = isinstance(source, str) and not (options["base_folder"] / source).is_file()
        if elsewhere:
            assert source.startswith(("hf://datasets/", "data/")), source
            rows = YES_OR_NO if "/persona/" in source else LETTERS
            file = tmp_path / f"rows{Path(source).suffix}"
            lines = [json.dumps(row) for row in rows]
            file.write_text("\n".join(lines) if file.suffix == ".jsonl" else f"[{','.join(lines)}]", encoding="utf-8")
            source, options = str(file), {**options, "base_folder": tmp_path}
        return real(source, **options)

    def run(path: Path, folder: Path, *, hub: bool = False) -> BuildPlan:
        patching.setattr(
            patcher.build.planning,
            "find_model",
            lambda model, *_, **__: Source(model, hub, "0" * 40 if hub else None, folder),
        )
        return plan_build(job_of(path, tmp_path / "out"))

    # Nothing that a proof depends on is replaced, so this asks for no `monkeypatch`: recipes of one model share proofs.
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(patcher.vectors.finding, "load_pairs", load)
        yield run


def expected_layers(recipe: Recipe) -> list[int]:
    (count,) = (value for key, value in released_config(fixture_of(recipe)).items() if key in DEPTH)
    layers = set()
    for vector in recipe.vectors:
        if vector.before_layer is not None:
            assert isinstance(vector.before_layer, int)
            layers.add(vector.before_layer - 1)
        elif isinstance(vector.layer, str):
            layers.add(int(vector.layer.rstrip("%")) * count // 100)
        else:
            assert isinstance(vector.layer, int)
            layers.add(vector.layer)
    return sorted(layers)


def assert_planned(recipe: Recipe, done: BuildPlan) -> None:
    layers = expected_layers(recipe)
    assert done.plan.route == ROUTES[recipe.model]
    assert done.plan.exact
    assert list(done.plan.sites) == layers
    assert sorted(tensor.layer for tensor in done.plan.carriers if tensor.layer is not None) == layers
    assert len(done.prepared) == len(recipe.vectors)
    assert {layer for entry in done.prepared for layer in entry.layers} == set(layers)
    for entry, spec in zip(done.prepared, recipe.vectors, strict=True):
        assert entry.pair_count > 0
        if isinstance(spec.pairs, list):
            assert len(entry.pairs) + len(entry.held_out) == len(spec.pairs)
    value = json.loads(json.dumps(done.as_json()))
    assert value["route"]["name"] == ROUTES[recipe.model]
    assert all(vector["pairs"] > 0 for vector in value["vectors"])


@pytest.mark.slow_but(
    "current/*-concise.yaml", "current/mistral-*", "persona-*", "*/01-love-hate.yaml", "*/7b-sycophancy.yaml"
)
@pytest.mark.parametrize("path", PLANNED, ids=name_of)
def test_it_is_planned_on_a_tiny_model_of_its_architecture(
    path: Path, tiny: Callable[[Recipe], Path], plan: Callable[..., BuildPlan]
) -> None:
    recipe = load_recipe(path).recipe
    done = plan(path, tiny(recipe))
    assert_planned(recipe, done)
    moved = done.plan.renamed
    kept = {moved.get(name, name) for name in CheckpointFolder(tiny(recipe)).tensors if name not in done.plan.dropped}
    for tensor in done.plan.tensors:
        assert (tensor.name in kept) == (tensor.kind == "added")


@pytest.mark.slow_but("current/*", "persona-*", "*/01-love-hate.yaml", "*/7b-sycophancy.yaml")
@pytest.mark.parametrize("path", PLANNED, ids=name_of)
def test_it_is_planned_by_its_released_config(
    path: Path, released_only: Callable[[Recipe], Path], plan: Callable[..., BuildPlan], tmp_path: Path
) -> None:
    recipe = load_recipe(path).recipe
    done = plan(path, released_only(recipe), hub=True)
    assert_planned(recipe, done)
    config = parsed_config(released_config(fixture_of(recipe)), tmp_path / "parsed")
    assert all(config.hidden_size in tensor.shape for tensor in done.plan.carriers)
    assert done.architecture.block_count == config.num_hidden_layers


def test_every_recipe_is_planned_or_built() -> None:
    assert len(PLANNED) >= 40 and len(BUILT) >= 9
    assert {RECIPE_OF[path].model for path in PLANNED} == set(ROUTES)
