"""How texts that are measured lie in batches: beside one another in a row, what they begin with alike only once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from patcher.capture.batches import (
    Batch,
    PromptRow,
    Readable,
    RowImage,
    common_prefix,
    make_batches,
    plain_rows,
    shared_rows,
    side_by_side,
)
from patcher.capture.shared_prefixes import Exactness

PLAIN_TOKENS = 512
"""In a batch, where nothing says how many a device computes well."""


@dataclass(frozen=True)
class Text:
    """A text to be run.

    Attributes:
        ids: its tokens.
        read: the places after which the next-token distribution is wanted.
        image: the image that stands among them, or None.
    """

    ids: Sequence[int]
    read: Sequence[int]
    image: RowImage | None = None


@dataclass
class Layout:
    """How a model's rows may be made.

    Attributes:
        tokens: the most in a batch; one text is always run.
        find_out: what the architecture computes alike, alone and together; None: nothing is put together.
        positions: how many the model has, if it has a table of them.
    """

    tokens: int = PLAIN_TOKENS
    find_out: Callable[[], Exactness] | None = None
    positions: int | None = None

    @cached_property
    def exactness(self) -> Exactness | None:
        """What may be computed together; None where nobody knows."""
        return None if self.find_out is None else self.find_out()

    @property
    def packs(self) -> bool:
        """Whether texts may share a row."""
        return self.exactness is not None and self.exactness.sharing is None

    def give_up_packing(self) -> None:
        """From now on every text has a row of its own."""
        self.find_out = None
        self.__dict__.pop("exactness", None)

    def batches(self, texts: Sequence[Readable], most_rows: int | None = None) -> Iterator[Batch]:
        """The texts in batches, those of like length together, the longest first."""
        rows = self._rows(texts)
        return make_batches(rows, texts, token_budget=self.tokens, most_rows=most_rows)

    def _rows(self, texts: Sequence[Readable]) -> list[PromptRow]:
        if len(texts) < 2 or not self.packs or self.exactness is None:
            return plain_rows(texts)
        limits = (self.tokens, self.exactness.window, self.positions)
        longest, linear = min(limit for limit in limits if limit is not None), self.exactness.linear_tokens
        rows = shared_rows(texts, linear_tokens=linear, longest=longest)
        return side_by_side(rows, linear_tokens=linear, longest=longest, token_budget=self.tokens)

    def count(self, texts: Sequence[Readable], most_rows: int | None = None) -> int:
        """How many tokens the batches of these texts hold, those that fill them up included."""
        if not texts:
            return 0
        return sum(batch.inputs["input_ids"].numel() for batch in self.batches(texts, most_rows))


def distinct_tokens(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens there are to compute where what sequences begin with alike is computed once."""
    total = 0
    last: tuple[int, ...] = ()
    for ids in sorted(map(tuple, sequences)):
        total += len(ids) - common_prefix(ids, last)
        last = ids
    return total
