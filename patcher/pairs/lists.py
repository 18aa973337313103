"""Lists without partners: from the recipe, a file or the Hub to texts, each a text, a conversation or a response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patcher.errors import InputError
from patcher.pairs.columns import value_at
from patcher.pairs.documents import TEXT
from patcher.pairs.list_files import Item, read_items
from patcher.pairs.messages import as_prompt, check_turns, is_conversation, read_conversation
from patcher.pairs.pair import ListedText, Side
from patcher.pairs.problems import Problems, RowProblem, require_text, shown
from patcher.pairs.read_once import read_once
from patcher.pairs.unknown_columns import LABELS, columns_line, keys_of, may_be_text
from patcher.recipe.pairs import Columns
from patcher.recipe.vector import VectorSpec

TEXT_COLUMNS = ("text", "instruction", "prompt", "goal", "question", "query", "behavior", "sentence", "content")
"""Columns that hold a text, by their usual names."""
CONVERSATION_COLUMNS = ("messages", "conversation", "conversations")
RESPONSE_COLUMNS = ("response", "completion", "continuation", "answer")
"""Columns that hold what was written after the text."""

_HEADLESS = "; if this is a text and not the name of a column, put a line with `text` above it"


@dataclass(frozen=True)
class _Read:
    """Which columns of a row are read.

    Attributes:
        text: the text, or what continues the prompt.
        prompt: what it continues, or None.
    """

    text: str
    prompt: str | None


def load_list(spec: VectorSpec, side: Side, *, base_folder: Path, where: str) -> tuple[list[ListedText], list[str]]:
    """Read the list of one side.

    Args:
        spec: of the vector: `positives` or `negatives` is read, by the `columns`.
        base_folder: the recipe's folder; paths are relative to it.
        where: the recipe's key, for errors and for the origin of texts in the recipe.

    Returns:
        At least one text, in the order of the source, and notes that say what was read.

    Raises:
        InputError: with every text that cannot be used, up to ten; or if the file or its columns cannot be told.
        OutsideError: if the Hub or the disk fails.
        MissingExtraError: if a Hub data set is asked for and the ``datasets`` package is missing.
    """
    source = spec.positives if side == "positive" else spec.negatives
    assert source is not None

    def read() -> tuple[list[ListedText], list[str]]:
        return _load(source, side, spec.columns, base_folder, where)

    texts, notes = read_once(source, base_folder, ("list", side, spec.columns, where), read)
    return list(texts), list(notes)


def _load(
    source: str | list[Any], side: Side, columns: Columns | None, base_folder: Path, where: str
) -> tuple[list[ListedText], list[str]]:
    notes = list[str]()
    if isinstance(source, list):
        items: Sequence[Item] = [(item, f"{where}.{index}") for index, item in enumerate(source)]
        problems, columns = Problems(), None
    else:
        named = None if columns is None else columns.named[side]
        found = read_items(
            source, side, named, base_folder=base_folder, where=where, fits=lambda names: _fits(names, columns, side)
        )
        items, problems = found.items, Problems(found.unread)
        notes += found.notes
        # The name was that of a list in the document, not of a column.
        columns = None if found.took_name else columns
        if columns is not None and columns.named[side] != TEXT and not any(_is_row(item) for item, _origin in items):
            remedy = f"its texts have no columns; leave `columns` out, or name `{TEXT}` for this side"
            raise InputError(f"there is no column `{columns.named[side]}`", where=source, remedy=remedy)
    name = source if isinstance(source, str) else where
    chosen: _Read | None = None
    texts = []
    for item, origin in items:
        with problems.collected():
            if _is_row(item) and chosen is None:
                chosen = _columns_of(item, side, columns, origin)
                notes.append(_said(chosen, item, name))
            texts.append(_listed(item, chosen, origin))
    notes += _labelled([item for item, _origin in items if _is_row(item)], name)
    problems.raise_if_any(f"{name} has texts that cannot be used")
    if not texts:
        raise InputError("there are no texts", where=name, remedy="give at least two, one on each line")
    return texts, notes


def _is_row(item: object) -> bool:
    return isinstance(item, Mapping) and not is_conversation(item)


def _fits(names: Sequence[str], columns: Columns | None, side: Side) -> bool:
    if columns is not None:
        return columns.named[side].partition(".")[0] in names
    return any(name.casefold() in (*TEXT_COLUMNS, *CONVERSATION_COLUMNS) for name in names)


def _columns_of(row: Mapping[str, Any], side: Side, columns: Columns | None, origin: str) -> _Read:
    """Which columns of the rows are read, by the first row.

    Raises:
        InputError: it cannot be told.
    """
    names = [str(name) for name in row]
    if columns is not None:
        read = _Read(columns.named[side], columns.prompt)
        for column in filter(None, (read.text, read.prompt)):
            try:
                value_at(row, column)
            except KeyError:
                message = f"there is no column `{column}`"
                raise InputError(message, where=origin, found=keys_of(names), remedy="name one of these") from None
        return read
    texts = [name for name in names if name.casefold() in (*TEXT_COLUMNS, *CONVERSATION_COLUMNS)]
    responses = [name for name in names if name.casefold() in RESPONSE_COLUMNS]
    if len(texts) == 1 and len(responses) <= 1:
        return _Read(responses[0], texts[0]) if responses else _Read(texts[0], None)
    several = [*texts, *responses] if texts or len(responses) > 1 else []
    held = [name for name in several or names if may_be_text(row[name])]
    example = max(held, key=lambda name: len(str(row[name])), default="...") if not several else several[0]
    headless = "" if several or not any(" " in name for name in names) else _HEADLESS
    raise InputError(
        "several columns could be the text" if several else "none of the columns is known as that of a text",
        where=origin,
        found=", ".join(several) if several else keys_of(names),
        remedy="name the column that each list is read from, perhaps one name for both: "
        f"`{columns_line(example, example)}`{headless}",
    )


def _said(chosen: _Read, row: Mapping[str, Any], name: str) -> str:
    read = {column.partition(".")[0] for column in filter(None, (chosen.text, chosen.prompt))}
    others = [str(key) for key in row if key not in read]
    what = f"the column `{chosen.text}`" + (f" after the prompt in `{chosen.prompt}`" if chosen.prompt else "")
    left = "" if not others else "; not read: " + ", ".join(others[:6]) + (", ..." if len(others) > 6 else "")
    return f"{name}: {what} is read{left}"


def _labelled(rows: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """A note where rows are of several kinds, by a label of theirs that is not looked at."""
    for column in (str(key) for key in (rows[0] if rows else ()) if str(key).casefold() in LABELS):
        values = list(dict.fromkeys(str(row.get(column)) for row in rows))
        if 1 < len(values) <= 10:
            return [f"{name}: rows of every `{column}` are in this list: {', '.join(values)}"]
    return []


def _listed(item: Any, read: _Read | None, origin: str) -> ListedText:
    if not _is_row(item):
        return _whole(item, "this text", origin)
    assert read is not None
    if item.get("image") not in (None, ""):
        message = "this text has an image, and only pairs may have one"
        raise RowProblem(message, origin, None, "give `pairs` in the place of the lists, or leave `image` out")
    text, prompt = _value(item, read.text, origin), None
    if read.prompt is not None:
        prompt = _value(item, read.prompt, origin)
    if prompt in (None, ""):
        return _whole(text, f"`{read.text}`", origin)
    if is_conversation(prompt):
        turns = read_conversation(prompt, str(read.prompt), origin)
        check_turns(turns, f"`{read.prompt}`", origin)
        before = as_prompt(turns)
    else:
        before = _text(prompt, f"`{read.prompt}`", origin)
    if is_conversation(text):
        # The response as a conversation of its own, as preference data has it.
        turns = read_conversation(text, read.text, origin)
        if [turn.role for turn in turns] != ["assistant"]:
            raise RowProblem(f"`{read.text}` is not one turn of the assistant", origin, shown(text))
        text = turns[0].content
    return ListedText(before, _text(text, f"`{read.text}`", origin), origin)


def _value(row: Mapping[str, Any], column: str, origin: str) -> Any:
    try:
        return value_at(row, column)
    except KeyError:
        message = f"the column `{column}` is missing, which other rows have"
        raise RowProblem(message, origin, keys_of(row)) from None


def _whole(value: Any, what: str, origin: str) -> ListedText:
    """A text, or a conversation that ends with what is read: the user's turn, or the assistant's."""
    if not is_conversation(value):
        return ListedText(None, _text(value, what, origin), origin)
    turns = read_conversation(value, what.strip("`"), origin)
    *before, last = turns
    if last.role == "assistant":
        check_turns(tuple(before), what, origin)
        return ListedText(as_prompt(tuple(before)), _text(last.content, what, origin), origin)
    check_turns(turns, what, origin)
    # A single turn of the user is what a text is.
    return ListedText(None, last.content, origin) if not before else ListedText(turns, "", origin)


def _text(value: object, what: str, origin: str) -> str:
    text = require_text(value, what, origin)
    if not text.strip():
        raise RowProblem(f"{what} is empty", origin)
    return text
