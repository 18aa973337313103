"""Tables and lines that reports are made of. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from patcher.stacks.names import LABELS

NO_TERMINAL_WIDTH = 118
HEADS = ("exact", "run-time cost", *LABELS.values())
"""What is said of a route."""


def console_for(*, to_stderr: bool = False) -> Console:
    """Where reports go."""
    console = Console(stderr=to_stderr, highlight=False)
    # In a log or a pipe there is no width to fit; on a narrow terminal tables fold.
    return console if console.is_terminal else Console(stderr=to_stderr, highlight=False, width=NO_TERMINAL_WIDTH)


def empty_table(*columns: str) -> Table:
    """A plain table."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for column in columns:
        table.add_column(column)
    return table


def routes_table(*heads: str) -> Table:
    """A table of routes. On a narrow terminal the cost folds, and nothing else."""
    table = empty_table(*heads)
    for column in table.columns:
        column.no_wrap = column.header != HEADS[1]
    return table


def print_pairs(console: Console, pairs: Sequence[tuple[str, str]], indent: int = 2) -> None:
    """A name and a text that folds, line by line."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in pairs:
        # As Text, so that a bracket in a name is no markup.
        grid.add_row(" " * indent + name, Text(text))
    console.print(grid)
