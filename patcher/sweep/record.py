"""Finished cells on the disk: an interrupted sweep goes on where it stopped.

Those of another sweep are not taken for this one's. A cell does not depend on the other cells, on the guard, or on what
is shown of the chosen one, so that a wider grid or another guard takes what was measured before.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

import patcher
from patcher.checkpoint.copying import sha256_of
from patcher.disk.failures import told_as
from patcher.disk.whole_files import is_partial, whole_file
from patcher.errors import InputError
from patcher.recipe.file import LoadedRecipe
from patcher.recipe.schema import Recipe
from patcher.recipe.vector import VectorSpec
from patcher.sweep.cells import Cell
from patcher.sweep.materials import Parts

CELLS = "cells.jsonl"
FORMAT = 3
_LEFT_OUT = ("output", "push", "verify", "targets", "exact", "prefer", "route", "calibration")
"""Keys of a recipe on which no number of a sweep depends."""
_OF_CELLS = {
    "evaluate": ("pairs", "on_topic", "off_topic", "neutral", "neutral_limit"),
    "sweep": ("vector", "choose", "limit"),
}
"""Of these two, the keys on which the numbers of a cell depend."""


class CellRecord:
    """The file of finished cells of one sweep, a JSON object a line; the first line says which sweep it is.

    Args:
        folder: of the sweep's results.
        fingerprint: all that the numbers depend on.
        settings: all that the results beside them depend on as well.
        force: start anew where the file is another sweep's.

    Attributes:
        same: whether the results in the folder, if there are any, are of these settings.

    Raises:
        InputError: the folder holds another sweep, or something else.
        OutsideError: it cannot be written.
    """

    def __init__(
        self, folder: Path, fingerprint: Mapping[str, Any], settings: Mapping[str, Any], *, force: bool = False
    ) -> None:
        self.folder, self._path = folder, folder / CELLS
        self._cells: dict[tuple[int, float, int], Cell] = {}
        self.same = False
        head = json.loads(json.dumps({"format": FORMAT, "fingerprint": fingerprint, "settings": settings}))
        with told_as("the folder cannot be looked at", folder):
            there = folder.exists()
        if there:
            lines = self._lines(force)
            before: Any = None
            with suppress(ValueError):
                before = json.loads(lines[0]) if lines else None
            if isinstance(before, dict) and all(before.get(key) == head[key] for key in ("format", "fingerprint")):
                self._take(lines[1:])
                self.same = before == head
            elif lines and not force:
                raise InputError(
                    "the folder holds the results of another sweep: the recipe, the model or the version differ",
                    where=str(folder),
                    remedy="give --output another folder, or --force to start anew",
                    code="output",
                )
        with told_as("the results cannot be written", folder):
            folder.mkdir(parents=True, exist_ok=True)
            # Written anew: a line that a killed process left half is gone, and another sweep's cells with it.
            for item in filter(_is_left_over, self._items()):
                item.unlink()
            kept = "".join(_line(cell) for cell in self._cells.values())
            with whole_file(self._path) as partial:
                partial.write_text(json.dumps(head) + "\n" + kept, encoding="utf-8")

    def __len__(self) -> int:
        return len(self._cells)

    def get(self, layer: int, coefficient: float, items: int) -> Cell | None:
        """The cell, if it was measured on exactly ``items`` items."""
        return self._cells.get((layer, coefficient, items))

    def put(self, cell: Cell) -> None:
        """Keep a finished cell; it is on the disk when this returns.

        Raises:
            OutsideError: it cannot be written.
        """
        self._cells[cell.layer, cell.coefficient, cell.pairs] = cell
        with told_as("a result cannot be written", self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(_line(cell))
            file.flush()
            os.fsync(file.fileno())

    def _lines(self, force: bool) -> list[str]:
        if not self.folder.is_dir():
            raise InputError("this is a file, not a folder", where=str(self.folder), code="output")
        if not self._path.is_file():
            if not all(_is_left_over(item) for item in self._items()):
                raise InputError(
                    "the folder holds something else, and is not touched",
                    where=str(self.folder),
                    remedy="give --output another folder",
                    code="output",
                )
            return []
        try:
            return self._path.read_text(encoding="utf-8").splitlines() or [""]
        except (OSError, UnicodeDecodeError) as error:
            if force:
                return [""]
            raise InputError(
                "the finished cells cannot be read", where=str(self._path), found=error, remedy="--force starts anew"
            ) from None

    def _items(self) -> list[Path]:
        with told_as("the folder cannot be looked into", self.folder):
            return list(self.folder.iterdir())

    def _take(self, lines: list[str]) -> None:
        for line in lines:
            # Half a line is from a process that was killed: the cell is measured again.
            with suppress(ValueError, TypeError, KeyError):
                cell = Cell.from_json(json.loads(line))
                self._cells[cell.layer, cell.coefficient, cell.pairs] = cell


def _is_left_over(item: Path) -> bool:
    """Whether a process left it that was killed while it wrote the first line."""
    return is_partial(item) and item.name.lstrip(".").startswith(CELLS)


def _line(cell: Cell) -> str:
    return json.dumps(cell.as_json()) + "\n"


def on_recorded_days(folder: Path, specs: Sequence[VectorSpec]) -> list[VectorSpec]:
    """The vectors of a recipe on the days of the sweep that the folder holds, so that it goes on from there.

    A chat template may write the date into prompts. Days that the recipe fixes itself stay.
    """
    try:
        with (folder / CELLS).open(encoding="utf-8") as file:
            before = json.loads(file.readline())["fingerprint"]["recipe"]["vectors"]
        days = [
            None if entry["template_date"] is None else date.fromisoformat(entry["template_date"]) for entry in before
        ]
    except (OSError, ValueError, TypeError, LookupError):
        return list(specs)
    if len(days) != len(specs):
        return list(specs)
    pairs = zip(specs, days, strict=True)
    return [s if s.template_date or day is None else s.model_copy(update={"template_date": day}) for s, day in pairs]


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
    named = [evaluate.on_topic, evaluate.off_topic, evaluate.neutral]
    files = [None if name is None else _digest(loaded.file(name)) for name in named]
    files += [None if entry.file is None else _digest(entry.file.weights) for entry in parts.prepared]
    pairs = [[pair.prompt, pair.positive, pair.negative] for pair in (*parts.choose, *parts.report)]
    tokens = [[side.ids for side in entry.sides] for entry in parts.prepared]
    texts = [item.words for both in (parts.choose_texts, parts.report_texts) for item in both]
    content = json.dumps([identity, pairs, *([texts] if texts else []), tokens, files], sort_keys=True, default=str)
    return {
        "recipe": data,
        "content": hashlib.sha256(content.encode()).hexdigest(),
        "versions": [patcher.__version__, torch.__version__, transformers.__version__],
    }


def _digest(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        # Whoever needs it will say so in its own words.
        return f"not read: {error.errno}"
