"""What chat was given to open: a patched folder, a recipe, or the folder of a sweep. Nothing heavy is imported."""

from __future__ import annotations

from pathlib import Path

from patcher.checkpoint.steering_files import MANIFEST
from patcher.errors import InputError
from patcher.sweep.file_names import RECIPE, RESULT


def recipe_or_folder(path: Path) -> Path:
    """The recipe or the patched folder that is meant.

    Args:
        path: a patched folder, a recipe, or the folder of a sweep, whose chosen recipe is taken.

    Raises:
        InputError: it is none of these.
    """
    if path.is_dir() and (path / RESULT).is_file():
        if not (path / RECIPE).is_file():
            raise InputError(
                "this sweep chose nothing, so there is no recipe to try",
                where=str(path),
                remedy="give a recipe with a layer and a coefficient of your own",
            )
        path = path / RECIPE
    if not path.is_file() and not (path / MANIFEST).is_file():
        raise InputError(
            f"this is not a patched folder: it has no {MANIFEST}" if path.exists() else "there is no such folder",
            where=str(path),
            remedy="give a folder that patch-model wrote, a recipe, or the folder of a sweep",
        )
    return path


def require_recipe_options(path: Path, *, base: str | None, adapter: str | None, baked: bool) -> None:
    """Options that go with a patched folder are refused beside a recipe.

    Raises:
        InputError: one of them is given.
    """
    for given, name, remedy in (
        (base, "--base", "--set model=PATH"),
        (adapter, "--adapter", "--set adapter=PATH"),
        (baked, "--baked", "build it first, then give the patched folder"),
    ):
        if given:
            raise InputError(f"{name} goes with a patched folder, and this is a recipe", where=str(path), remedy=remedy)
