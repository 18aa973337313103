"""The recipe's keys for where contrast pairs come from: written in the recipe, or columns of a data set."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from patcher.recipe.types import Strict


class InlineTurn(Strict):
    """One turn of a conversation written in the recipe itself."""

    role: Literal["system", "user", "assistant"]
    """Who speaks."""
    content: str
    """What is said."""


class InlinePair(Strict):
    """A contrast pair written in the recipe itself."""

    prompt: str | Annotated[list[InlineTurn], Field(min_length=1)] | None = None
    """What both sides continue: a text, or the turns of a conversation; without it each side is a whole text."""
    positive: str
    """The text that shows what the vector should add."""
    negative: str
    """Its contrast; may be empty."""
    image: Annotated[str, Field(min_length=1)] | None = None
    """An image that both sides are about, for a model that takes images: a path."""


def _of_no_other_form(value: Any) -> Any:
    """Refuse what other tools call pairs, with the way in which it is written here."""
    if isinstance(value, dict):
        raise ValueError(
            "pairs are a path or a list; two lists without partners are `positives: [...]` and `negatives: [...]` in "
            "the place of `pairs`"
        )
    if isinstance(value, list) and any(isinstance(item, str | list) for item in value):
        raise ValueError("a pair is written `{positive: ..., negative: ...}`, perhaps with a `prompt`")
    return value


Pairs = Annotated[str | list[InlinePair], BeforeValidator(_of_no_other_form)]


def _place(value: Any) -> Any:
    """A place in a list, as the text that names a column."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Column = Annotated[str, BeforeValidator(_place), Field(min_length=1)]


class Columns(Strict):
    """Which column of a data set is which. `a.b` is the key `b` inside of `a`, and `a.0` the first member of `a`."""

    positive: Column
    """The side that shows what the vector should add."""
    negative: Column
    """Its contrast."""
    prompt: Column | None = None
    """What both sides continue; with `format: ab` the question."""
    system: Column | None = None
    """A system prompt that goes before the prompt."""
    image: Column | None = None
    """An image that both sides are about: a path relative to the data set's file, or the bytes of an image."""

    @property
    def named(self) -> dict[str, str]:
        """What it is for -> the column, of those that are given."""
        return {key: column for key, column in self.model_dump().items() if column is not None}
