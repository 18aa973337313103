"""Neutral text, on which a steering vector should change little: everyday facts, directions, talk, code, numbers."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import TypeVar

Text = TypeVar("Text")


def neutral_texts(limit: int | None = None) -> list[str]:
    """The passages that are bundled with this package, written for it; kinds of text take turns.

    Args:
        limit: only the first so many.

    Returns:
        English passages of one to five lines, none of which is about a behaviour, a feeling or an opinion.
    """
    text = resources.files("patcher.evaluate").joinpath("neutral.txt").read_text(encoding="utf-8")
    return _passages(text)[:limit]


def in_measured_order(texts: Sequence[Text]) -> list[Text]:
    """Every other text, then the others: a sweep chooses on the first half, so a build's guard is of a part of it."""
    return [*texts[0::2], *texts[1::2]]


def _passages(text: str) -> list[str]:
    """What stands between empty lines."""
    return [passage for passage in (part.strip("\n") for part in text.split("\n\n")) if passage]
