"""A recipe's text with some values changed, its comments kept."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from patcher.errors import InputError
from patcher.recipe.file import LoadedRecipe, validate_recipe
from patcher.recipe.schema import Recipe
from patcher.recipe.yaml_lines import parse_yaml

Key = tuple[int | str, ...]
_PATHS = (
    ("adapter",),
    ("calibration", "texts"),
    *(("evaluate", name) for name in ("lm_eval_folder", "off_topic", "on_topic", "neutral", "pairs")),
    ("model",),
)
_CHOSEN = ("layer", "before_layer", "coefficient", "template_date")


def chosen_recipe(recipe: Recipe, vector: int, layer: int, coefficient: float) -> Recipe:
    """The recipe with the layer and the coefficient of one vector filled in."""
    specs = list(recipe.vectors)
    # The embedding, -1, has no other name in a recipe.
    place = {"layer": None, "before_layer": 0} if layer < 0 else {"layer": layer, "before_layer": None}
    specs[vector] = specs[vector].model_copy(update={**place, "coefficient": coefficient})
    return recipe.model_copy(update={"vectors": specs})


def lines_of(cell: Mapping[str, Any]) -> str:
    """The keys of a vector in a recipe, with the layer and the coefficient of a cell: what a person would write."""
    place = "before_layer: 0" if cell["layer"] < 0 else f"layer: {cell['layer']}"
    return f"`{place}`, `coefficient: {cell['coefficient']:g}`"


def moved_text(before: LoadedRecipe, after: Recipe, to: Path) -> str:
    """The text of ``after`` for a file in another folder, as like that of ``before`` as can be.

    Args:
        before: the recipe that was read, with what the command line changed.
        after: the same with a layer, a coefficient and a template's day filled in.
        to: the folder of the new file.
    """
    wanted = _with_paths(after, before.folder, to)
    try:
        edited = _edited(before.text, before.recipe, wanted)
        if validate_recipe(parse_yaml(edited, "recipe")) == wanted:
            return edited
    except (InputError, yaml.YAMLError, KeyError, IndexError, TypeError):
        pass  # such as --set, or anchors: then it is written anew
    data = wanted.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def _with_paths(recipe: Recipe, folder: Path, to: Path) -> Recipe:
    data = recipe.model_dump(mode="json")
    for key in _path_keys(data):
        node = _value(data, key[:-1])
        node[key[-1]] = _moved(node[key[-1]], folder, to)
    return Recipe.model_validate(data)


def _path_keys(data: Mapping[str, Any]) -> Iterator[Key]:
    keys: list[Key] = [*_PATHS]
    for index in range(len(data["vectors"])):
        keys += [("vectors", index, name) for name in ("file", "pairs", "positives", "negatives", "questions")]
    yield from (key for key in keys if isinstance(_value(data, key), str))


def _moved(value: str, folder: Path, to: Path) -> str:
    path = Path(value).expanduser()
    # A Hub id, or a data set there, is no path.
    if path.is_absolute() or "://" in value or not (folder / path).exists():
        return value
    return os.path.relpath((folder / path).resolve(), to.resolve())


def _edited(text: str, before: Recipe, wanted: Recipe) -> str:
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    old, new = before.model_dump(mode="json"), wanted.model_dump(mode="json")
    edits: list[tuple[int, int, str]] = []
    for key in _path_keys(new):
        node = _node(root, key)
        if node is not None and _value(old, key) != _value(new, key):
            edits.append((node.start_mark.index, _end(node, text), _written(_value(new, key))))
    for index, (first, second) in enumerate(zip(old["vectors"], new["vectors"], strict=True)):
        if any(first[name] != second[name] for name in _CHOSEN):
            edits += _vector_edits(_node(root, ("vectors", index)), second, text)
    for start, end, replacement in sorted(edits, reverse=True):
        text = text[:start] + replacement + text[end:]
    return text


def _vector_edits(mapping: Any, vector: Mapping[str, Any], text: str) -> list[tuple[int, int, str]]:
    pairs = {key.value: (key, value) for key, value in mapping.value}
    key, value = pairs["layer" if "layer" in pairs else "before_layer"]
    end = _end(value, text)
    name = "layer" if vector["before_layer"] is None else "before_layer"
    layer = f"{name}: {_written(vector[name])}"
    between = ", " if mapping.flow_style else "\n" + " " * key.start_mark.column
    if vector["template_date"] is not None and "template_date" not in pairs:
        layer += f"{between}template_date: {_written(vector['template_date'])}"
    if "coefficient" in pairs:
        coefficient = pairs["coefficient"][1]
        edits = [(coefficient.start_mark.index, _end(coefficient, text), _written(vector["coefficient"]))]
    else:
        layer, edits = f"{layer}{between}coefficient: {_written(vector['coefficient'])}", []
    return [*edits, (key.start_mark.index, end, layer)]


def _end(node: Any, text: str) -> int:
    """Where a node's text ends; a block list's mark is at the next key, past the comments between."""
    if isinstance(node, yaml.SequenceNode) and not node.flow_style and node.value:
        return _end(node.value[-1], text)
    start, end = int(node.start_mark.index), int(node.end_mark.index)
    return start + len(text[start:end].rstrip())


def _written(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _node(root: Any, key: Key) -> Any:
    for part in key:
        if isinstance(part, int):
            root = root.value[part]
        elif root is not None:
            root = next((value for name, value in root.value if name.value == part), None)
    return root


def _value(data: Any, key: Key) -> Any:
    for part in key:
        data = data[part]
    return data
