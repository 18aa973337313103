"""A table of numbers: what is shown, and what it is sorted by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from patcher.report.pictures.reading import has_numbers, number
from patcher.report.pictures.wording import fixed, shown


@dataclass(frozen=True)
class Value:
    """What a cell shows, and what it is sorted by: a number, or None for its text (a number's absence sorts last)."""

    text: str
    key: float | None = None


ALIGNED: Final = "aligned"
"""As many decimals as the largest number of a column needs for three digits."""


@dataclass(frozen=True)
class TableColumn:
    """A column.

    Attributes:
        title: of the header.
        key: of its value in a row.
        numeric: sorted by value and set flush right.
        digits: significant digits of its numbers.
        places: decimals of all its numbers, in the place of ``digits``.
        signed: a plus sign stands before numbers above 0.
    """

    title: str
    key: str
    numeric: bool = True
    digits: int = 3
    places: int | Literal["aligned"] | None = None
    signed: bool = False

    def values(self, rows: Sequence[Mapping[str, Any]]) -> list[Value]:
        """What the column shows in each row."""
        if not self.numeric:
            return [Value(str(row.get(self.key, ""))) for row in rows]
        found = [number(row.get(self.key)) for row in rows]
        places = self.places
        if places == ALIGNED:
            most = max((abs(value) for value in found if value is not None), default=0.0)
            places = min(6, max(0, 2 - math.floor(math.log10(most)))) if most > 0 else 0
        if places is None:
            return [Value(shown(value, digits=self.digits, signed=self.signed), value) for value in found]
        return [Value(fixed(value, places, signed=self.signed), value) for value in found]


@dataclass(frozen=True)
class TableRow:
    values: list[Value]
    marked: bool = False


@dataclass(frozen=True)
class Table:
    """A caption, columns, and rows of as many values."""

    name: str
    caption: str
    columns: list[TableColumn]
    rows: list[TableRow]


def table_of(
    name: str, caption: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[TableColumn]
) -> Table | None:
    """A table without the numeric columns that are absent in every row; None without rows.

    A row with a true ``marked`` is marked.
    """
    if not rows:
        return None
    kept = [column for column in columns if not column.numeric or has_numbers(rows, column.key)]
    lines = zip(*(column.values(rows) for column in kept), strict=True)
    marks = [bool(row.get("marked")) for row in rows]
    return Table(name, caption, kept, [TableRow(list(line), mark) for line, mark in zip(lines, marks, strict=True)])
