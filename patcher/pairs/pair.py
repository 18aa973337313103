"""The types that the way from a data set to token ids is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from patcher.errors import Problem

if TYPE_CHECKING:
    from patcher.pairs.image_prompts import SeenImage
    from patcher.pairs.images import PairImage


@dataclass(frozen=True)
class Record:
    """One record: its values by key, and where it stands, for errors."""

    values: dict[str, Any]
    origin: str


@dataclass
class Table:
    """What a source holds.

    Attributes:
        rows: those that could be read, in order.
        problems: one for each row that could not.
        lists: of a document of several lists, ``{"good": [...], "bad": [...]}``: name -> its items, of any lengths;
            there are no ``rows`` then.
        notes: what was guessed when it was read.
    """

    rows: list[Record] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    lists: Mapping[str, Sequence[Any]] | None = None
    notes: list[str] = field(default_factory=list)


Fits = Callable[[Sequence[str]], bool]
"""Whether columns of these names are those that are looked for."""


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation, for a chat template; ``role`` is ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


Side = Literal["positive", "negative"]
SIDES: tuple[Side, Side] = ("positive", "negative")

Prompt = str | tuple[Turn, ...]
"""What a model continues: a text (one turn of the user), or a conversation of several turns."""


@dataclass(frozen=True)
class ContrastPair:
    """Two texts that differ in what the vector should add.

    Attributes:
        prompt: what both sides continue; None where each side is a whole text.
        positive: the side that shows the behaviour (an answer, a continuation or a text), whitespace as given.
        negative: its contrast; may be empty.
        origin: where the pair was read: ``pairs.jsonl:12``, ``pairs.json[3]``, ``recipe.yaml: vectors.0.pairs.3``.
        choices: for ``ab`` every offered answer in order, spelled like the answers; else empty.
        format: ``ab`` where the sides are answers to a question with choices.
        written: where the model wrote the sides, its very ids: positive, negative.
        image: what both sides are about, or None.
    """

    prompt: Prompt | None
    positive: str
    negative: str
    origin: str
    choices: tuple[str, ...] = ()
    format: Literal["ab", "pairs"] = "pairs"
    written: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    image: PairImage | None = None


@dataclass(frozen=True)
class ListedText:
    """A text of a list whose members have no partners.

    Attributes:
        prompt: what the text continues; None where it is a whole text.
        text: a whole text, or what continues the prompt; empty where the prompt alone is read.
        origin: where it was read: ``bad.txt:12``, ``recipe.yaml: vectors.0.positives.3``.
    """

    prompt: Prompt | None
    text: str
    origin: str

    @property
    def words(self) -> tuple[Prompt | None, str]:
        """What tells it from other texts, the white space around it apart."""
        return self.prompt, self.text.strip()

    def as_pair(self, *, asked: bool, origin: str | None = None) -> ContrastPair:
        """A pair whose negative side is empty, for what is told of pairs and of texts alike.

        Args:
            asked: whether a whole text is what the model is asked, and so the prompt.
            origin: in the place of the text's own.
        """
        origin = self.origin if origin is None else origin
        if self.prompt is None and asked:
            return ContrastPair(self.text, "", "", origin)
        return ContrastPair(self.prompt, self.text, "", origin)


@dataclass(frozen=True)
class TokenisedSide:
    """One side of a pair as the model sees it.

    Attributes:
        ids: token ids, special tokens at the front and alignment padding included.
        read: absolute, non-negative indices into ``ids`` whose residuals are averaged.
        continuation_start: index of the first token of the answer or continuation; for a whole text the number
            of special tokens at the front (0, or 1 after BOS).
        image: the image that stands among them, or None.
    """

    ids: tuple[int, ...]
    read: tuple[int, ...]
    continuation_start: int
    image: SeenImage | None = None


@dataclass(frozen=True)
class TokenisedPair:
    """Both sides of a pair as the model sees them, and where the pair was read."""

    positive: TokenisedSide
    negative: TokenisedSide
    origin: str
