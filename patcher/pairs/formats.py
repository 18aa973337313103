"""Rows to contrast pairs: which keys a row must have, and which answers a question offers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from patcher.errors import InputError
from patcher.pairs.pair import ContrastPair, Record
from patcher.pairs.problems import Problems, RowProblem, did_you_mean, require_utf8, shown
from patcher.pairs.sources import read_rows
from patcher.recipe.evaluate import InlinePair

Format = Literal["ab", "pairs"]

QUESTION, MATCHING, NOT_MATCHING = "question", "answer_matching_behavior", "answer_not_matching_behavior"
_REQUIRED: dict[Format, tuple[str, ...]] = {
    "ab": (QUESTION, MATCHING, NOT_MATCHING),
    "pairs": ("positive", "negative"),
}
_LETTER_ANSWER = re.compile(r"(?P<before>[\s(\[]*)(?P<letter>[A-Za-z])(?P<after>[\s)\].:]*)")


def load_pairs(
    source: str | list[InlinePair],
    *,
    base_folder: Path,
    format: Literal["auto", "ab", "pairs"] = "auto",
    where: str,
) -> list[ContrastPair]:
    """Read contrast pairs from a recipe, a file or the Hub.

    Args:
        source: inline pairs, a ``.json``, ``.jsonl``, ``.ndjson`` or ``.csv`` path relative to ``base_folder``, or
            ``hf://datasets/owner/name[/config-or-file][@split]``.
        base_folder: the recipe's folder.
        format: ``ab`` rows have ``question``, ``answer_matching_behavior`` and ``answer_not_matching_behavior``
            (model-written evaluations, Perez et al. 2022; CAA, Rimsky et al. 2024); ``pairs`` rows have
            ``positive``, ``negative`` and perhaps ``prompt``; ``auto`` looks at the first row.
        where: the recipe's key, for errors and for the origin of inline pairs.

    Returns:
        At least one pair, in the order of the source.

    Raises:
        InputError: with every row that cannot be used, up to ten.
        OutsideError: if the Hub or the disk fails.
        MissingExtraError: if a Hub data set is asked for and the ``datasets`` package is missing.
    """
    if isinstance(source, list):
        return _inline_pairs(source, format, where)
    rows, unread = read_rows(source, base_folder=base_folder, where=where)
    problems = Problems(unread)
    pairs: list[ContrastPair] = []
    if rows:
        expected = _format_of(rows[0]) if format == "auto" else format
        for row in rows:
            with problems.collected():
                pairs.append(_pair_from_row(row, expected))
    problems.raise_if_any(f"{source} has rows that cannot be used")
    return pairs


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


def _inline_pairs(source: list[InlinePair], format: str, where: str) -> list[ContrastPair]:
    problems = Problems()
    pairs: list[ContrastPair] = []
    for index, item in enumerate(source):
        origin = f"{where}.{index}"
        values: dict[str, Any] = {"prompt": item.prompt, "positive": item.positive, "negative": item.negative}
        if format == "ab":
            values = {QUESTION: item.prompt, MATCHING: item.positive, NOT_MATCHING: item.negative}
        with problems.collected():
            if format == "ab" and not item.prompt:
                raise RowProblem("with `format: ab` an inline pair needs a `prompt`: the question", origin)
            pairs.append(_pair_from_row(Record(values, origin), "ab" if format == "ab" else "pairs"))
    problems.raise_if_any(f"{where} has pairs that cannot be used")
    if not pairs:
        raise InputError("there are no contrast pairs", where=where, remedy="give at least one")
    return pairs


def _format_of(row: Record) -> Format:
    complete: list[Format] = [name for name, keys in _REQUIRED.items() if all(key in row.values for key in keys)]
    if len(complete) == 2:
        raise InputError(
            "the first row has the keys of both formats",
            where=row.origin,
            found=_keys(row),
            remedy="say which to use: `format: ab` or `format: pairs`",
        )
    if complete:
        return complete[0]
    # Not complete, but clearly one of them: the missing key is then named for every row.
    begun: list[Format] = [name for name, keys in _REQUIRED.items() if _near(keys, row.values)]
    if len(begun) == 1:
        return begun[0]
    raise InputError(
        "the first row has the keys of no known format",
        where=row.origin,
        found=_keys(row),
        remedy=f"rows have {_listed(_REQUIRED['ab'])} (ab), or {_listed(_REQUIRED['pairs'])} and perhaps `prompt` "
        "(pairs)",
    )


def _near(keys: Iterable[str], values: dict[str, Any]) -> bool:
    return any(key in values or did_you_mean(key, map(str, values)) for key in keys)


def _pair_from_row(row: Record, format: Format) -> ContrastPair:
    missing = [key for key in _REQUIRED[format] if key not in row.values]
    if missing:
        raise _missing_keys(row, format, missing)
    texts = [_text(row, key) for key in _REQUIRED[format]]
    if format == "pairs":
        prompt = None if row.values.get("prompt") is None else _text(row, "prompt")
        return ContrastPair(prompt or None, texts[0], texts[1], row.origin)
    question, positive, negative = texts
    for key, text in zip(_REQUIRED["ab"], texts, strict=True):
        if not text.strip():
            raise RowProblem(f"`{key}` is empty", row.origin)
    if positive.strip() == negative.strip():
        remedy = "a contrast needs two different answers"
        raise RowProblem("both answers are the same", row.origin, shown(positive), remedy)
    choices = offered_choices(question, positive, negative)
    return ContrastPair(question, positive, negative, row.origin, choices, "ab")


def _missing_keys(row: Record, format: Format, missing: Sequence[str]) -> RowProblem:
    other: Format = "pairs" if format == "ab" else "ab"
    if all(key in row.values for key in _REQUIRED[other]):
        message = f"this row is of format {other}, the others are of format {format}"
        return RowProblem(message, row.origin, _keys(row), "put the two formats into files and vectors of their own")
    names = _listed(missing)
    message = f"the key{'s' if len(missing) > 1 else ''} {names} {'are' if len(missing) > 1 else 'is'} missing"
    unknown = [str(key) for key in row.values if key not in _REQUIRED[format]]
    near = [(match, key) for key in missing if (match := did_you_mean(key, unknown))]
    remedy = "; ".join(f"did you mean this by `{match}`? Name it `{key}`" for match, key in near)
    return RowProblem(message, row.origin, _keys(row), remedy or f"format {format} needs {_listed(_REQUIRED[format])}")


def _text(row: Record, key: str) -> str:
    value = row.values[key]
    if not isinstance(value, str):
        raise RowProblem(f"`{key}` is not text", row.origin, f"{type(value).__name__}: {shown(value)}")
    return require_utf8(value, f"`{key}`", row.origin)


def _keys(row: Record) -> str:
    names = ", ".join(str(key) for key in row.values)
    return f"keys: {names[:150]}{'...' if len(names) > 150 else ''}" if names else "no keys"


def _listed(keys: Sequence[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys)
