"""A recipe together with the file that it was read from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from patcher.recipe.schema import Recipe


@dataclass(frozen=True)
class LoadedRecipe:
    """What a build is made from.

    Attributes:
        recipe: the keys: those of the file, with what the command line changed.
        text: of the file, verbatim.
        path: of the file.
    """

    recipe: Recipe
    text: str
    path: Path

    @property
    def folder(self) -> Path:
        """What paths in the recipe are relative to."""
        return self.path.parent

    def file(self, given: str) -> Path:
        """Where a path that the recipe gives is; ``~`` is the user's home."""
        return self.folder / Path(given).expanduser()

    def place(self, key: str) -> str:
        """How an error names a key: ``recipe.yaml: vectors.0``."""
        return f"{self.path.name}: {key}"

    def changed(self, **keys: Any) -> LoadedRecipe:
        """The same file with other values of some keys; they are not validated."""
        return replace(self, recipe=self.recipe.model_copy(update=keys))
