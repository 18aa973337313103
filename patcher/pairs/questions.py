"""Questions that the model is to answer itself: from the recipe, a file or the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from patcher.errors import InputError, Problem
from patcher.errors.causes import cause_of
from patcher.errors.misspelt import closest
from patcher.pairs.hub_datasets import HUB_PREFIX
from patcher.pairs.list_files import Item
from patcher.pairs.pair import ContrastPair
from patcher.pairs.problems import Problems, RowProblem, require_utf8, shown
from patcher.pairs.sources import read_bytes, read_rows
from patcher.pairs.unknown_columns import keys_of

KEYS = ("question", "prompt")
_LISTED = "questions"
_FORMS = 'a list of texts or of {"question": ...}, or {"questions": [...]}'


def load_questions(source: str | list[str], *, base_folder: Path, where: str) -> list[ContrastPair]:
    """Read questions; each is a contrast pair whose sides the model has yet to write.

    Args:
        source: a list of texts; or a path relative to ``base_folder``: ``.txt`` (one a line), ``.json`` (a list of
            texts or of ``{question}`` as CAA's open-ended sets, or ``{"questions": [...]}`` as the trait files of
            Persona Vectors), ``.jsonl``, ``.ndjson``, ``.csv`` (a column ``question``); or ``hf://datasets/...``.
        base_folder: the recipe's folder.
        where: the recipe's key, for errors and for the origin of questions in the recipe.

    Returns:
        At least one pair of prompt and empty sides, in order; a question that is there twice is asked once.

    Raises:
        InputError: with every question that cannot be used, up to ten.
        OutsideError: if the Hub or the disk fails.
        MissingExtraError: if a Hub data set is asked for and the ``datasets`` package is missing.
    """
    problems = Problems()
    questions: dict[str, ContrastPair] = {}
    if isinstance(source, list):
        items: list[Item] = [(text, f"{where}.{index}") for index, text in enumerate(source)]
    else:
        items = _read(source, base_folder, where, problems)
    for item, origin in items:
        with problems.collected():
            text = _text(item, origin)
            questions.setdefault(text, ContrastPair(text, "", "", origin))
    shown_source = source if isinstance(source, str) else where
    problems.raise_if_any(f"{shown_source} has questions that cannot be used")
    if not questions:
        raise InputError("there are no questions", where=shown_source, remedy="give at least one")
    return list(questions.values())


def _read(source: str, base_folder: Path, where: str, problems: Problems) -> list[Item]:
    suffix = Path(source).suffix.lower()
    if source.startswith("hf://") or suffix == ".csv":
        table = read_rows(source, base_folder=base_folder, where=where)
        for problem in table.problems:
            problems.add(problem)
        return [(row.values, row.origin) for row in table.rows]
    if suffix not in (".txt", ".json", ".jsonl", ".ndjson"):
        raise InputError(
            f"questions are read from .txt, .json, .jsonl, .ndjson and .csv files and {HUB_PREFIX}...",
            where=where,
            found=shown(source),
            remedy="write them into a .txt file, one on each line",
        )
    try:
        text = read_bytes(source, base_folder, where).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError("the file is not UTF-8 text", where=source, remedy="save it as UTF-8") from None
    if suffix == ".json":
        return _json_items(text, source)
    # Not splitlines(): JSON strings may hold U+2028 and its like as they are.
    lines = [(line, f"{source}:{number}") for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return list(lines if suffix == ".txt" else _json_lines(lines, problems))


def _json_items(text: str, source: str) -> list[Item]:
    try:
        document = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        where = f"{source}:{error.lineno}"
        raise InputError(f"broken JSON at column {error.colno}: {error.msg}", where=where) from None
    except (ValueError, RecursionError) as error:
        raise InputError("the JSON cannot be read", where=source, found=cause_of(error)) from None
    prefix = source
    if isinstance(document, dict) and isinstance(document.get(_LISTED), list):
        document, prefix = document[_LISTED], f"{source}: {_LISTED}"
    if not isinstance(document, list):
        raise InputError(f"a JSON file of questions is {_FORMS}", where=source, found=shown(document))
    return [(item, f"{prefix}[{index}]") for index, item in enumerate(document)]


def _json_lines(lines: list[tuple[str, str]], problems: Problems) -> Iterator[Item]:
    for line, origin in lines:
        try:
            yield json.loads(line), origin
        except (ValueError, RecursionError) as error:
            problems.add(Problem("the JSON of this line cannot be read", origin, cause_of(error)))


def _text(item: Any, origin: str) -> str:
    """The question of an item, stripped.

    Raises:
        RowProblem: there is none.
    """
    if isinstance(item, dict):
        key = next((key for key in KEYS if key in item), None)
        if key is None:
            near = closest(KEYS[0], map(str, item))
            hint = "a question is a text, or an object that has one"
            remedy = f"did you mean this by `{near}`? Name it `{KEYS[0]}`" if near else hint
            raise RowProblem(f"the key `{KEYS[0]}` is missing", origin, keys_of(item), remedy)
        if item.get("image") not in (None, ""):
            message = "this question has an image, and only pairs may have one"
            raise RowProblem(message, origin, None, "give `pairs`, or leave `image` out")
        item = item[key]
    if not isinstance(item, str):
        raise RowProblem("a question is a text", origin, f"{type(item).__name__}: {shown(item)}")
    text = item.strip()
    if not text:
        raise RowProblem("this question is empty", origin)
    return require_utf8(text, "this question", origin)
