"""Write the quickstart into a folder of the user's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from patcher.demo import demo_folder
from patcher.disk.failures import disk_errors
from patcher.errors import InputError
from patcher.recipe.schema import recipe_schema

RECIPE = "quickstart.yaml"
SCHEMA = "recipe.schema.json"


def write_demo(folder: Path) -> Path:
    """Copy the demonstration model, the pairs and the recipe into ``folder``; the recipe's path.

    Raises:
        InputError: the folder exists and is not empty.
        OutsideError: the disk is full or forbids it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError("the demo's folder is not empty", where=str(folder), remedy="patch-model demo ANOTHER_FOLDER")
    source = demo_folder()
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source / "model", folder / "model", ignore=shutil.ignore_patterns("__pycache__"))
        for item in sorted(source.iterdir()):
            if item.suffix in (".jsonl", ".txt", ".yaml"):
                shutil.copyfile(item, folder / item.name)
        (folder / SCHEMA).write_text(json.dumps(recipe_schema(), indent=2) + "\n", encoding="utf-8")
    return folder / RECIPE
