"""How values are put into the Markdown of the model card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import Template

from patcher.report.templates import counted, environment
from patcher.routes.in_words import constant_in_words

NOTHING = "–"
_LONGEST_TEXT = 400
_LONGEST_SETTING = 80
_KEPT = ("|", "- ", "```")
"""How blocks begin whose lines stay as they are: tables, lists, code."""


@lru_cache(maxsize=1)
def card_template() -> Template:
    """``card.md.jinja``; in it, a number is shown as people read it, and what is not there as a dash."""
    found = environment(__package__, autoescape=False, finalize=shown)
    filters = (counted, grouped, percent, code, listed, quoted, settings, table, lines, constant_in_words)
    found.filters |= {**{function.__name__: function for function in filters}, "number": shown}
    found.globals["row"] = row
    return found.get_template("card.md.jinja")


def paragraphs(text: str) -> str:
    """What a template gives as Markdown: one line a paragraph, one blank line between two of them."""
    blocks = re.split(r"\n(?:[ \t]*\n)+", text.strip())
    return "\n\n".join(block if block.startswith(_KEPT) else " ".join(lines(block)) for block in blocks)


def lines(text: str) -> list[str]:
    """The lines that are not blank, without blanks around them."""
    return [line.strip() for line in text.split("\n") if line.strip()]


def table(text: str) -> str:
    """A Markdown table of lines of cells, the head first; columns that are empty in every row are left out.

    Args:
        text: a line a row, as :func:`row` makes them.

    Returns:
        The table with blank lines around it; nothing where there is a head alone.
    """
    head, *body = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines(text)]
    if not body:
        return ""
    kept = [column for column in range(len(head)) if any(cells[column] != NOTHING for cells in body)]
    shown_rows = [head, ["---"] * len(head), *body]
    return "\n" + "".join(f"| {' | '.join(cells[column] for column in kept)} |\n" for cells in shown_rows) + "\n"


def row(*values: Any) -> str:
    """A row of a table."""
    return f"| {' | '.join(map(_cell, values))} |"


def _cell(value: Any) -> str:
    return str(shown(value)).replace("|", "\\|").replace("\n", " ")


def shown(value: Any) -> Any:
    """A number as people read it; a dash for what is not there; everything else as it is."""
    if isinstance(value, float):
        small_or_large = value and (abs(value) < 1e-3 or abs(value) >= 1e6)
        return f"{value:.1e}" if small_or_large else f"{value:.4g}"
    return NOTHING if value is None else value


def grouped(count: int | None) -> str:
    """``1,234,567``."""
    return f"{count or 0:,}"


def percent(value: float | None) -> str:
    """A share in per cent; a dash where there is none."""
    if value is None:
        return NOTHING
    if 0 < abs(value) < 1e-3:
        return "under 0.1 %"
    return f"{100 * value:.0f} %" if abs(value) >= 0.1 else f"{100 * value:.1f} %"


def code(text: Any) -> str:
    return f"`{text}`"


def listed(items: Sequence[Any]) -> str:
    """``a, b and c``."""
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def quoted(text: str | None) -> str:
    """A model's own words, so that Markdown shows them and does nothing else with them."""
    text = re.sub(r"\s+", " ", text or "").strip()
    text = text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 1] + "…"
    return re.sub(r"([\\`*_{}\[\]<>()#+!~$@])", r"\\\1", text)


def settings(changes: Mapping[str, Any]) -> str:
    """Keys of a configuration with their new values."""
    return ", ".join(_setting(key, value) for key, value in changes.items())


def _setting(key: str, value: Any) -> str:
    if value is None:
        return f"`{key}` removed"
    text = json.dumps(value, ensure_ascii=False)
    if len(text) > _LONGEST_SETTING and isinstance(value, Sequence):
        return f"`{key}` (now {len(value)} entries)"
    return f"`{key}: {text}`"
