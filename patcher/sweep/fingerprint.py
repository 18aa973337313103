"""What the numbers of a cell depend on: finished cells of another sweep are not taken for this one's.

A cell does not depend on the other cells, on the guard, or on what is shown of the chosen one. So a wider grid or
another guard takes what was measured before.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

import patcher
from patcher.recipe.file import LoadedRecipe
from patcher.recipe.schema import Recipe
from patcher.sweep.materials import Parts

_LEFT_OUT = ("output", "push", "verify", "targets", "exact", "prefer", "route", "calibration")
"""Keys of a recipe on which no number of a sweep depends."""
_OF_CELLS = {
    "evaluate": ("pairs", "on_topic", "off_topic", "neutral", "neutral_limit"),
    "sweep": ("vector", "choose", "limit"),
}
"""Of these two, the keys on which the numbers of a cell depend."""


def settings(recipe: Recipe) -> dict[str, Any]:
    """The keys of a recipe on which something in ``sweep.json`` depends."""
    data = recipe.model_dump(mode="json")
    return {key: value for key, value in data.items() if key not in _LEFT_OUT}


def fingerprint(
    loaded: LoadedRecipe, identity: Mapping[str, Any] | str | None, parts: Parts, index: int
) -> dict[str, Any]:
    """All that a cell's numbers depend on: the recipe, the files that it names, the model, the versions.

    Args:
        index: of the vector that is swept; its own layer and the size of its coefficient are not those of the cells.
    """
    recipe = loaded.recipe
    data = settings(recipe)
    for part, keys in _OF_CELLS.items():
        data[part] = {key: data[part][key] for key in keys}
    swept = data["vectors"][index]
    swept["layer"], swept["coefficient"] = None, math.copysign(1.0, recipe.vectors[index].factor)
    evaluate = recipe.evaluate
    named = [evaluate.on_topic, evaluate.off_topic, evaluate.neutral, *(spec.file for spec in recipe.vectors)]
    files = [None if name is None else _digest(loaded.file(name)) for name in named]
    pairs = [[pair.prompt, pair.positive, pair.negative] for pair in (*parts.choose, *parts.report)]
    tokens = [[pair.positive.ids, pair.negative.ids] for entry in parts.prepared for pair in entry.pairs]
    content = json.dumps([identity, pairs, tokens, files], sort_keys=True, default=str)
    return {
        "recipe": data,
        "content": hashlib.sha256(content.encode()).hexdigest(),
        "versions": [patcher.__version__, torch.__version__, transformers.__version__],
    }


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while part := file.read(1 << 20):
                digest.update(part)
    except OSError as error:
        # Whoever needs it will say so in its own words.
        return f"not read: {error.errno}"
    return digest.hexdigest()
