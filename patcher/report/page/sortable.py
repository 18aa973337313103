"""A table of numbers: what is shown, and what it is sorted by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from patcher.report.pictures.reading import number
from patcher.report.pictures.wording import fixed, shown


@dataclass(frozen=True)
class Value:
    """What a cell shows, and what it is sorted by: a number, or None for its text (a number's absence sorts last)."""

    text: str
    key: float | None = None


@dataclass(frozen=True)
class TableColumn:
    """A column.

    Attributes:
        title: of the header.
        numeric: sorted by value and set flush right.
        places: its numbers have one number of decimals, as many as the largest needs for three digits.
        signed: a plus sign stands before numbers above 0.
    """

    title: str
    numeric: bool = True
    places: bool = False
    signed: bool = False


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
    rows: list[TableRow] = field(default_factory=list)


Read = Callable[[Mapping[str, Any]], Value]


def numeric(value: Any, *, digits: int = 3, signed: bool = False) -> Value:
    found = number(value)
    return Value(shown(found, digits=digits, signed=signed), found)


def table_of(
    name: str,
    caption: str,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[tuple[TableColumn, Read]],
    marked: Callable[[Mapping[str, Any]], bool] = lambda _: False,
) -> Table | None:
    """A table without the numeric columns that are absent in every row; None without rows."""
    if not rows:
        return None
    kept = [
        (column, read)
        for column, read in columns
        if not column.numeric or any(read(row).key is not None for row in rows)
    ]
    columns_read = [_aligned_texts(column, [read(row) for row in rows]) for column, read in kept]
    filled = [
        TableRow(list(values), marked(row)) for values, row in zip(zip(*columns_read, strict=True), rows, strict=True)
    ]
    return Table(name, caption, [column for column, _ in kept], filled)


def _aligned_texts(column: TableColumn, values: list[Value]) -> list[Value]:
    if not column.places:
        return values
    most = max((abs(value.key) for value in values if value.key is not None), default=0.0)
    places = min(6, max(0, 2 - math.floor(math.log10(most)))) if most > 0 else 0
    return [Value(fixed(value.key, places, signed=column.signed), value.key) for value in values]
