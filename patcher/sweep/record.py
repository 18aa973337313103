"""Finished cells on the disk: an interrupted sweep goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patcher.disk.whole_files import is_partial, whole_file
from patcher.errors import InputError, OutsideError
from patcher.sweep.cells import Cell

CELLS = "cells.jsonl"
FORMAT = 2


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
        if _there(folder):
            lines = self._lines(force)
            before = _parsed(lines[0]) if lines else None
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
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Written anew: a line that a killed process left half is gone, and another sweep's cells with it.
            for item in filter(_is_left_over, self._items()):
                item.unlink()
            kept = "".join(_line(cell) for cell in self._cells.values())
            with whole_file(self._path) as partial:
                partial.write_text(json.dumps(head) + "\n" + kept, encoding="utf-8")
        except OSError as error:
            raise OutsideError("the results cannot be written", where=str(folder), found=error, code="disk") from None

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
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(cell))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutsideError("a result cannot be written", where=str(self._path), found=error, code="disk") from None

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
        try:
            return list(self.folder.iterdir())
        except OSError as error:
            raise OutsideError(
                "the folder cannot be looked into", where=str(self.folder), found=error, code="disk"
            ) from None

    def _take(self, lines: list[str]) -> None:
        for line in lines:
            try:
                cell = Cell.from_json(json.loads(line))
            except (ValueError, TypeError, KeyError):
                continue  # half a line, from a process that was killed: the cell is measured again
            self._cells[cell.layer, cell.coefficient, cell.pairs] = cell


def _is_left_over(item: Path) -> bool:
    """Whether a process left it that was killed while it wrote the first line."""
    return is_partial(item) and item.name.lstrip(".").startswith(CELLS)


def _there(folder: Path) -> bool:
    try:
        return folder.exists()
    except OSError as error:
        raise OutsideError("the folder cannot be looked at", where=str(folder), found=error, code="disk") from None


def _line(cell: Cell) -> str:
    return json.dumps(cell.as_json()) + "\n"


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
