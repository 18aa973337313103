"""Every recipe under `recipes/` can be read, and the released configurations of its model are sound."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from support.families import Family, families
from support.old_transformers import skip_if_too_old
from support.tiny_wrappers import released_wrappers

from patcher.recipe.file import load_recipe
from patcher.recipe.pairs import InlinePair
from patcher.recipe.schema import Recipe

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
CONFIGS = Path(__file__).parents[1] / "fixtures" / "configs"

QUICKSTART = RECIPES / "quickstart.yaml"
PATHS = sorted(RECIPES.rglob("*.yaml"))
README = (RECIPES / "README.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| \[(?P<file>[^\]]+)\]\((?P<link>[^)]+)\) \| (?P<rest>.+) \|$", re.MULTILINE)

NEEDS_A_DOWNLOAD = "# NEEDS A DOWNLOAD into "

# A recipe's model whose own configuration is not among the fixtures: the one that stands in for it.
STANDS_IN = {
    "allenai/OLMo-2-0425-1B-Instruct": "allenai/OLMo-2-0425-1B",
    "Qwen/Qwen2.5-0.5B-Instruct": "Qwen/Qwen2.5-0.5B",
}
SHRUNK: dict[str, str | Family] = {
    **{family.release: family for family in families() if family.config},
    **{entry["release"]: name for name, entry in released_wrappers().items()},
}
"""Models whose released configuration is here with small sizes alone: how their tiny stand-in is made."""


def name_of(path: Path) -> str:
    return path.relative_to(RECIPES).as_posix()


def leading_comment(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[: next(index for index, line in enumerate(lines) if not line.startswith("#"))]


def local_files(recipe: Recipe) -> list[str]:
    named = [recipe.evaluate.on_topic, recipe.evaluate.off_topic, recipe.evaluate.pairs]
    for vector in recipe.vectors:
        named += [vector.file, vector.pairs, vector.positives, vector.negatives, vector.questions]
    return [file for file in named if isinstance(file, str) and not file.startswith("hf://")]


def is_folder(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.count("/") != 1


every_recipe = pytest.mark.parametrize("path", PATHS, ids=name_of)


def test_there_are_recipes() -> None:
    folders = {path.parent.name for path in PATHS}
    assert folders >= {"actadd-gpt2-xl", "caa-llama-2", "current"}
    numbers = {path.stem[:2] for path in PATHS if path.parent.name == "actadd-gpt2-xl" and path.stem[0].isdigit()}
    assert numbers == {f"{number:02}" for number in range(1, 17)}


@every_recipe
def test_it_parses(path: Path) -> None:
    loaded = load_recipe(path)
    recipe = loaded.recipe
    assert loaded.text == path.read_text(encoding="utf-8")
    assert recipe.push is None, "a recipe that people run publishes nothing unasked"
    assert not recipe.trust_remote_code


@every_recipe
def test_it_begins_by_saying_what_it_is(path: Path) -> None:
    if path == QUICKSTART:
        pytest.skip("written by the demo, which has its own tests")
    comment = leading_comment(path)
    assert 3 <= len(comment) <= 7
    assert all(line.startswith("# ") and len(line) <= 118 for line in comment)
    assert any(line.startswith(("# Source: ", "# Pairs: ")) for line in comment)
    if path.parent.name == "actadd-gpt2-xl":
        assert path.stem.endswith("-fails") == ("A FAILURE" in comment[0])
        assert "at every position" in re.sub(r"\s*\n# ", " ", "\n".join(comment)), "what a bias does differently"


@every_recipe
def test_its_files_are_there(path: Path) -> None:
    recipe = load_recipe(path).recipe
    announced = [
        line.removeprefix(NEEDS_A_DOWNLOAD).split(",")[0]
        for line in leading_comment(path)
        if line.startswith(NEEDS_A_DOWNLOAD)
    ]
    files = local_files(recipe)
    assert set(announced) <= set(files)
    for file in files:
        assert not Path(file).is_absolute()
        assert (path.parent / file).is_file() or file in announced, file


@every_recipe
def test_its_model_has_a_released_configuration(path: Path) -> None:
    model = load_recipe(path).recipe.model.split("@")[0]
    if is_folder(model):
        pytest.skip(f"a folder: {model}")
    if model in SHRUNK:
        comment = "\n".join(leading_comment(path))
        assert "Tried: a tiny random model" in comment and "Not tried: the release itself" in comment
        return
    assert (CONFIGS / f"{STANDS_IN.get(model, model).replace('/', '--')}.json").is_file()


def test_names_and_outputs_are_unique() -> None:
    stems = [path.stem for path in PATHS]
    outputs = [load_recipe(path).recipe.output for path in PATHS]
    assert len(set(stems)) == len(stems)
    assert len(set(outputs)) == len(outputs)


def test_actadd_recipes_are_the_experiments() -> None:
    """What makes a recipe ActAdd, and one in full."""
    for path in PATHS:
        if path.parent.name != "actadd-gpt2-xl":
            continue
        recipe = load_recipe(path).recipe
        assert recipe.model == "openai-community/gpt2-xl"
        for vector in recipe.vectors:
            assert isinstance(vector.pairs, list) and len(vector.pairs) == 1
            assert (vector.align, vector.position, vector.scale, vector.layer) == ("spaces", "mean", "raw", None)
    vector = load_recipe(RECIPES / "actadd-gpt2-xl" / "09-talk-about-weddings.yaml").recipe.vectors[0]
    assert vector.pairs == [
        InlinePair(positive="I talk about weddings constantly", negative="I do not talk about weddings constantly")
    ]
    assert (vector.before_layer, vector.coefficient) == (20, 4)


def test_caa_recipes_read_the_answer_at_the_papers_layer() -> None:
    seen = set()
    for path in PATHS:
        if path.parent.name == "caa-llama-2":
            size, behaviour = path.stem.split("-", 1)
            recipe = load_recipe(path).recipe
            (vector,) = recipe.vectors
            assert recipe.model == f"meta-llama/Llama-2-{size}-chat-hf"
            assert (vector.layer, vector.position, vector.format) == ({"7b": 13, "13b": 14}[size], "answer", "ab")
            assert abs(vector.coefficient) == 1
            seen.add((size, behaviour))
    assert len(seen) == 18
    assert {behaviour for size, behaviour in seen if size == "7b"} == {b for size, b in seen if size == "13b"}


def test_pairs_and_texts_beside_the_recipes() -> None:
    for path in sorted((RECIPES / "current" / "pairs").glob("*.jsonl")):
        pairs = [InlinePair(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        assert 8 <= len(pairs) <= 20
        assert len({(pair.prompt, pair.positive) for pair in pairs}) == len(pairs)
    for name in ("weddings", "shipping"):
        lines = (RECIPES / "texts" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        assert len(lines) >= 20 and all(line.strip() for line in lines)
        assert len(set(lines)) == len(lines)


# The README


def test_readme_lists_exactly_the_recipes() -> None:
    listed = [match["file"] for match in ROW.finditer(README)]
    assert all(match["file"] == match["link"] for match in ROW.finditer(README))
    assert len(set(listed)) == len(listed)
    quickstart = {name_of(QUICKSTART)}
    assert set(listed) - quickstart == {name_of(path) for path in PATHS} - quickstart


def test_readme_rows_say_what_the_recipes_say() -> None:
    for match in ROW.finditer(README):
        recipe = load_recipe(RECIPES / match["file"]).recipe
        model, _, layer, coefficient, expected, source = match["rest"].split(" | ")
        assert model == recipe.model
        assert expected.strip() and source.strip()
        layers = [f"before {v.before_layer}" if v.before_layer is not None else str(v.layer) for v in recipe.vectors]
        assert layer == ", ".join(layers)
        assert [float(part) for part in coefficient.split(", ")] == [v.coefficient for v in recipe.vectors]


def test_readme_overrides_work() -> None:
    commands = [
        shlex.split(line) for line in README.splitlines() if line.startswith("patch-model ") and "--set" in line
    ]
    assert len(commands) >= 4
    for _, path, *options in commands:
        assert options[::2] == ["--set"] * (len(options) // 2)
        load_recipe(ROOT / path, tuple(options[1::2]))


# The released configurations

CONFIG_FILES = sorted(CONFIGS.glob("*.json"))


def test_every_configuration_has_a_source() -> None:
    rows = re.findall(
        r"^\| `([^`]+)` \| ([^|]+) \| (\w+) \|", (CONFIGS / "SOURCES.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert {file for file, _, _ in rows} == {path.name for path in CONFIG_FILES}
    assert len(rows) == len(CONFIG_FILES) >= 40
    for file, hub_id, checked in rows:
        assert file == f"{hub_id.strip().replace('/', '--')}.json"
        assert checked in ("page", "copy", "derived", "memory")


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_configuration_is_as_released(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    assert config["model_type"] and config["architectures"]
    # transformers 5 writes these two instead of the old spellings; no release that is kept here has them.
    assert "dtype" not in config and "rope_parameters" not in config


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_configuration_makes_a_model(path: Path) -> None:
    skip_if_too_old(path.stem)
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    values = json.loads(path.read_text(encoding="utf-8"))
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) > 5e7


def test_yaml_files_have_no_tabs_or_trailing_blanks() -> None:
    for path in PATHS:
        text = path.read_text(encoding="utf-8")
        assert "\t" not in text and text.endswith("\n")
        assert not any(line != line.rstrip() for line in text.splitlines()), path
        assert isinstance(yaml.safe_load(text), dict)
