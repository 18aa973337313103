"""Rows to contrast pairs: texts with or without a prompt, and answers to a question that offers some."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from patcher.errors import InputError, Problem
from patcher.pairs.columns import AB, PAIRS, AskedFormat, Form, choose_form, fits, rows_of, value_at
from patcher.pairs.hub_datasets import HUB_PREFIX
from patcher.pairs.images import image_of
from patcher.pairs.messages import as_prompt, check_turns
from patcher.pairs.pair import ContrastPair, Prompt, Record, Table, Turn
from patcher.pairs.preferences import REPEATED, pair_of, text_at, without_repeated_prompts
from patcher.pairs.problems import (
    LeftOver,
    Problems,
    RowProblem,
    ending_with,
    example_lines,
    require_utf8,
    shown,
    suffix_of,
)
from patcher.pairs.read_once import read_once
from patcher.pairs.sources import read_rows
from patcher.pairs.unknown_columns import keys_of, listed, misspelt
from patcher.recipe.pairs import Columns, InlinePair

_LETTER_ANSWER = re.compile(r"(?P<before>[\s(\[]*)(?P<letter>[A-Za-z])(?P<after>[\s)\].:]*)")


def load_pairs(
    source: str | list[InlinePair],
    *,
    base_folder: Path,
    format: AskedFormat = "auto",
    columns: Columns | None = None,
    where: str,
    notes: list[str] | None = None,
) -> list[ContrastPair]:
    """Read contrast pairs from a recipe, a file or the Hub.

    Args:
        source: inline pairs, a path relative to ``base_folder`` or an ``hf://datasets/...`` address, see
            :func:`patcher.pairs.sources.read_rows`.
        base_folder: the recipe's folder.
        format: ``ab`` rows have ``question``, ``answer_matching_behavior`` and ``answer_not_matching_behavior``
            (model-written evaluations, Perez et al. 2022; CAA, Rimsky et al. 2024); ``pairs`` rows have
            ``positive``, ``negative`` and perhaps ``prompt``, and texts are taken as they are; ``auto`` looks at the
            names of the columns, and also knows preference data and texts of Human and Assistant.
        columns: which column is which, where they have other names.
        where: the recipe's key, for errors and for the origin of inline pairs.
        notes: what was guessed is added to them.

    Returns:
        At least one pair, in the order of the source.

    Raises:
        InputError: with every row that cannot be used, up to ten, and lines that would work.
        OutsideError: if the Hub or the disk fails.
        MissingExtraError: if a Hub data set or .parquet file is asked for and its package is missing.
    """
    if isinstance(source, list):
        with ending_with(example_lines("")):
            return _inline_pairs(source, base_folder, format, where)

    def read() -> tuple[list[ContrastPair], list[str]]:
        return _of_file(source, base_folder, format, columns, where)

    pairs, said = read_once(source, base_folder, ("pairs", format, columns, where), read)
    if notes is not None:
        notes += said
    return list(pairs)


def _of_file(
    source: str, base_folder: Path, format: AskedFormat, columns: Columns | None, where: str
) -> tuple[list[ContrastPair], list[str]]:
    hub = source.startswith(HUB_PREFIX)
    with ending_with(example_lines(".jsonl" if hub else suffix_of(source), "ab" if format == "ab" else "pairs")):
        found = partial(fits, asked=format, columns=columns)
        table = read_rows(source, base_folder=base_folder, where=where, fits=found)
        # Paths in a file are relative to it.
        folder = None if hub else (base_folder / Path(source).expanduser()).parent
        return _pairs_of_table(table, source, format, columns, where, folder), table.notes


def _pairs_of_table(
    table: Table,
    source: str,
    format: AskedFormat,
    columns: Columns | None,
    where: str,
    folder: Path | None = None,
) -> list[ContrastPair]:
    problems = Problems(table.problems)
    pairs: list[ContrastPair] = []
    left: list[Problem] = []
    rows: list[Record] = []
    counted: dict[str, int] = {}
    if table.rows or table.lists is not None:
        form = choose_form(table, format, columns, f"{where.removesuffix('pairs')}columns", source)
        rows = rows_of(table, form, source)
        for row in rows:
            with problems.collected():
                try:
                    pairs.append(_with_image(_pair_from_row(row, form, format, counted), row, form, folder))
                except LeftOver as over:
                    left.append(over.problem)
        if form.preference and (rest := without_repeated_prompts(pairs)):
            pairs, counted[REPEATED] = rest, len(rest)
    if len(left) > len(pairs):
        for problem in left:
            problems.add(problem)
    problems.raise_if_any(f"{source} has rows that cannot be used")
    table.notes += [f"{note} ({count} of {len(rows)} rows)" for note, count in counted.items()]
    table.notes += _gaps(pairs, source)
    if not pairs:
        raise InputError("there are no contrast pairs", where=source, remedy="give it at least one")
    for message in dict.fromkeys(problem.message for problem in left):
        count = sum(problem.message == message for problem in left)
        table.notes.append(f"{count} of {len(rows)} rows of {source} are left out: {message}")
    return pairs


def _gaps(pairs: Sequence[ContrastPair], source: str) -> Iterator[str]:
    """What some pairs lack and others have, which may be meant, or be a hole in the data."""
    empty = sum(not (pair.positive.strip() and pair.negative.strip()) for pair in pairs)
    alone = sum(pair.prompt is None for pair in pairs)
    seen = sum(pair.image is not None for pair in pairs)
    if 0 < seen < len(pairs):
        yield f"{len(pairs) - seen} of {len(pairs)} pairs of {source} have no image, and are read as text"
    if empty and len(pairs) > 1:
        yield f"{empty} of {len(pairs)} pairs of {source} have a side that is empty"
    twice = sum(
        isinstance(pair.prompt, str) and all(side.startswith(pair.prompt) for side in (pair.positive, pair.negative))
        for pair in pairs
    )
    if twice:
        yield f"{twice} of {len(pairs)} pairs of {source} begin with their prompt on both sides, so it is read twice"
    if 0 < alone < len(pairs):
        yield f"{alone} of {len(pairs)} pairs of {source} have no prompt, and are read as whole texts"


def offered_choices(question: str, positive: str, negative: str) -> tuple[str, ...]:
    """Every answer the question offers, spelled like ``positive`` (whitespace and brackets kept).

    Without letters in question and answers (Yes/No sets), or when the two answers are not both among the letters
    that were found, these are the two answers themselves.
    """
    spelled = _LETTER_ANSWER.fullmatch(positive)
    if spelled is not None:
        letters = _offered_letters(question, upper=spelled["letter"].isupper())
        choices = tuple(f"{spelled['before']}{letter}{spelled['after']}" for letter in letters)
        if positive in choices and negative in choices:
            return choices
    return positive, negative


def _offered_letters(question: str, *, upper: bool) -> list[str]:
    letter = "[A-Z]" if upper else "[a-z]"
    first = "A" if upper else "a"
    # Most specific first: a "(C)" or "I." inside the prose must not pass for an answer that is offered.
    for pattern in (rf"^\s*\(({letter})\)", rf"\(({letter})\)", rf"^\s*({letter})[).:]"):
        letters: list[str] = []
        for found in re.findall(pattern, question, re.MULTILINE):
            if found == chr(ord(first) + len(letters)):
                letters.append(found)
        if len(letters) >= 2:
            return letters
    return []


def _with_image(pair: ContrastPair, row: Record, form: Form, folder: Path | None) -> ContrastPair:
    if form.image is None:
        return pair
    try:
        value = value_at(row.values, form.image)
    except KeyError:
        return pair
    return replace(pair, image=image_of(value, folder, f"`{form.image}`", row.origin))


def _inline_pairs(source: list[InlinePair], base_folder: Path, format: AskedFormat, where: str) -> list[ContrastPair]:
    problems = Problems()
    pairs: list[ContrastPair] = []
    for index, item in enumerate(source):
        origin = f"{where}.{index}"
        with problems.collected():
            positive = require_utf8(item.positive, "`positive`", origin)
            negative = require_utf8(item.negative, "`negative`", origin)
            prompt = _inline_prompt(item, origin)
            if format == "ab":
                if prompt is None:
                    raise RowProblem("with `format: ab` an inline pair needs a `prompt`: the question", origin)
                pair = _ab_pair(prompt, positive, negative, origin)
            else:
                pair = ContrastPair(prompt, positive, negative, origin)
            pairs.append(replace(pair, image=image_of(item.image, base_folder, "`image`", origin)))
    problems.raise_if_any(f"{where} has pairs that cannot be used")
    if not pairs:
        raise InputError("there are no contrast pairs", where=where, remedy="give at least one")
    return pairs


def _inline_prompt(item: InlinePair, origin: str) -> Prompt | None:
    if item.prompt is None or isinstance(item.prompt, str):
        return require_utf8(item.prompt, "`prompt`", origin) if item.prompt else None
    turns = tuple(Turn(turn.role, require_utf8(turn.content, "`prompt`", origin)) for turn in item.prompt)
    check_turns(turns, "the prompt", origin)
    return as_prompt(turns)


def _pair_from_row(row: Record, form: Form, asked: AskedFormat, notes: dict[str, int]) -> ContrastPair:
    needed = [column for key, column in form.columns.items() if key not in form.optional]
    missing = [column for column in needed if column not in row.values and "." not in column]
    if missing:
        raise _missing_keys(row, form, needed, missing)
    if form.format == "pairs":
        return pair_of(row, form, dialogues=asked == "auto", notes=notes)
    question, positive, negative = (text_at(row, form.columns[key]) for key in AB)
    for key, text in zip(AB, (question, positive, negative), strict=True):
        if not text.strip():
            raise RowProblem(f"`{form.columns[key]}` is empty", row.origin)
    return _ab_pair(question, positive, negative, row.origin)


def _ab_pair(prompt: Prompt, positive: str, negative: str, origin: str) -> ContrastPair:
    question = prompt if isinstance(prompt, str) else prompt[-1].content
    for what, text in (("the question", question), ("`positive`", positive), ("`negative`", negative)):
        if not text.strip():
            raise RowProblem(f"{what} is empty", origin)
    if positive.strip() == negative.strip():
        remedy = "a contrast needs two different answers"
        raise RowProblem("both answers are the same", origin, shown(positive), remedy)
    return ContrastPair(prompt, positive, negative, origin, offered_choices(question, positive, negative), "ab")


def _missing_keys(row: Record, form: Form, needed: Sequence[str], missing: Sequence[str]) -> RowProblem:
    names = [str(name) for name in row.values]
    for other, columns in (("ab", AB), ("pairs", PAIRS)):
        if other != form.format and all(column in names for column in columns.values()):
            message = f"this row is of format {other}, the others are of format {form.format}"
            remedy = "put the two formats into files and vectors of their own"
            return RowProblem(message, row.origin, keys_of(names), remedy)
    one = len(missing) == 1
    message = f"the key{'' if one else 's'} {listed(missing)} {'is' if one else 'are'} missing"
    near = misspelt(missing, names, needed)
    if near is not None:
        return RowProblem(message, row.origin, keys_of(names), f"did you mean this by `{near[1]}`? Name it `{near[0]}`")
    return RowProblem(message, row.origin, keys_of(names), f"format {form.format} needs {listed(needed)}")
