"""Prompts to batches: rows that share the tokens which prompts have in common, sorted by length, under a token budget.

A row is a tree of tokens written out depth first. What several prompts begin with stands in it once. Every token sees
its own ancestors and itself, and its position is its depth. A prompt that shares nothing is a plain row.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch

Padding = Literal["right", "left"]
_WIDTHS = 32
"""How many widths of rows are tried, beside the widest row's own."""
_BATCH_TOKENS = 20
"""What a batch costs of its own, in tokens: the weights are read, and operators are called."""


class Readable(Protocol):
    """A tokenised prompt: its ids, and the positions whose residuals are averaged."""

    @property
    def ids(self) -> Sequence[int]: ...

    @property
    def read(self) -> Sequence[int]: ...


class RowImage(Protocol):
    """An image among the ids of a prompt."""

    @property
    def key(self) -> str:
        """Tells what is seen from anything else that may be seen in the same ids."""
        ...

    @property
    def columns(self) -> tuple[int, int]:
        """Where its tokens stand: the first, and one past the last."""
        ...

    @property
    def shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Of the inputs that stand for it beside the ids."""
        ...

    def inputs(self, ids: Sequence[int]) -> dict[str, torch.Tensor]:
        """What a forward pass of one row with these ids takes beside them."""
        ...


def image_in(prompt: Readable) -> RowImage | None:
    """The image among the ids of a prompt, if there is one."""
    found: RowImage | None = getattr(prompt, "image", None)
    return found


@dataclass(frozen=True)
class Place:
    """Where a prompt lies in a batch.

    Attributes:
        prompt: its index among the prompts.
        row: its row.
        columns: of the tokens that are read.
        counted: of the tokens that count in the mean residual norm: all but the first, where attention sinks live, and
            those of an image.
    """

    prompt: int
    row: int
    columns: tuple[int, ...]
    counted: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    Attributes:
        inputs: ``input_ids`` and ``position_ids`` [rows, width], int64; ``attention_mask`` [rows, width], int64, or
            [rows, 1, width, width] of booleans where rows hold trees. On the CPU.
        places: where its prompts lie.
        images: that of each row, or none at all. Its inputs are made only when the batch is run.
    """

    inputs: Mapping[str, torch.Tensor]
    places: tuple[Place, ...]
    images: tuple[RowImage, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and width."""
        rows, width = self.inputs["input_ids"].shape
        return rows, width

    def inputs_in(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The inputs for a model that computes in ``dtype``: a tree's mask becomes one that is added to the scores."""
        if self.images:
            return with_images(self.inputs["input_ids"], self.images, dtype)
        mask = self.inputs["attention_mask"]
        if mask.dtype != torch.bool:
            return dict(self.inputs)
        # Eager attention adds the mask as it is, so booleans would not mask anything.
        added = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
        return {**self.inputs, "attention_mask": added}

    def halves(self) -> tuple[Batch, Batch]:
        """The first and the second half of the rows; needs two rows."""
        middle = self.shape[0] // 2
        return self._rows(0, middle), self._rows(middle, self.shape[0])

    def _rows(self, start: int, end: int) -> Batch:
        places = tuple(replace(place, row=place.row - start) for place in self.places if start <= place.row < end)
        inputs = {name: value[start:end] for name, value in self.inputs.items()}
        return Batch(inputs, places, self.images[start:end])


def with_images(ids: torch.Tensor, images: Sequence[RowImage], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The inputs of rows that each hold an image, as a stock processor gives those of several: one after the other.

    Args:
        ids: [rows, width], int64; nothing is filled up. Positions are left to the class, which may count an image's
            tokens in a way of its own.
        images: of equal shapes.
        dtype: of what is not whole numbers.
    """
    parts = [image.inputs(row.tolist()) for row, image in zip(ids, images, strict=True)]
    beside = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    beside = {name: value.to(dtype) if value.is_floating_point() else value for name, value in beside.items()}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **beside}


def image_batches(
    prompts: Sequence[Readable], numbers: Sequence[int], *, token_budget: int, most_rows: int | None = None
) -> Iterator[Batch]:
    """Batches of prompts with images: rows of one width, with images of equal shapes, as many as the budget allows.

    Args:
        numbers: which of the prompts; each has an image.
        token_budget, most_rows: see :func:`make_batches`.
    """
    alike: dict[tuple[int, tuple[tuple[str, tuple[int, ...]], ...]], list[int]] = {}
    for number in numbers:
        image = image_in(prompts[number])
        assert image is not None
        alike.setdefault((len(prompts[number].ids), image.shapes), []).append(number)
    for (width, _shapes), members in alike.items():
        for start, end in _runs([width] * len(members), token_budget, most_rows):
            rows, places, images = members[start:end], [], []
            for row, number in enumerate(rows):
                image = image_in(prompts[number])
                assert image is not None
                images.append(image)
                counted = tuple(at for at in range(1, width) if not image.columns[0] <= at < image.columns[1])
                places.append(Place(number, row, tuple(prompts[number].read), counted or tuple(range(width))))
            ids = torch.tensor([list(prompts[number].ids) for number in rows])
            yield Batch({"input_ids": ids}, tuple(places), tuple(images))


@dataclass
class PromptRow:
    """Prompts that lie in one row.

    Attributes:
        ids: the row's tokens.
        depths: the position of each.
        paths: prompt -> the columns of its tokens.
    """

    ids: list[int]
    depths: list[int]
    paths: dict[int, list[int]]

    @property
    def is_tree(self) -> bool:
        """Whether prompts share tokens or stand side by side in it."""
        return len(self.paths) > 1

    def add(self, prompt: int, ids: Sequence[int], shared: Sequence[int]) -> None:
        """Append a prompt whose first tokens stand at the columns ``shared`` already."""
        start = len(self.ids)
        new = ids[len(shared) :]
        self.ids.extend(new)
        self.depths.extend(range(len(shared), len(ids)))
        self.paths[prompt] = [*shared, *range(start, start + len(new))]

    def append(self, other: PromptRow) -> None:
        """Put another row's trees beside those that are here; they see nothing of each other."""
        start = len(self.ids)
        self.ids.extend(other.ids)
        self.depths.extend(other.depths)
        for prompt, path in other.paths.items():
            self.paths[prompt] = [start + column for column in path]


def plain_rows(prompts: Sequence[Readable]) -> list[PromptRow]:
    """A row for each prompt."""
    rows = []
    for index, prompt in enumerate(prompts):
        rows.append(PromptRow([], [], {}))
        rows[-1].add(index, prompt.ids, ())
    return rows


def shared_rows(prompts: Sequence[Readable], *, linear_tokens: float, longest: int) -> list[PromptRow]:
    """Rows in which prompts share what they begin with, wherever that costs less than computing it again.

    In lexicographic order a prompt shares most with the one before it, so each joins that one's row or opens the next.

    Args:
        linear_tokens: what a token costs in a block's matrix products, in units of what one token costs to attend to
            one other; attention over a row grows with the square of its width.
        longest: no row becomes longer by sharing.
    """
    order = sorted(range(len(prompts)), key=lambda index: tuple(prompts[index].ids))
    rows: list[PromptRow] = []
    last = -1
    for index in order:
        ids = prompts[index].ids
        if rows:
            shared = common_prefix(ids, prompts[last].ids)
            width, new = len(rows[-1].ids), len(ids) - shared
            more_attention = new * (2 * width + new) - len(ids) ** 2
            if width + new <= longest and shared * linear_tokens > more_attention:
                rows[-1].add(index, ids, rows[-1].paths[last][:shared])
                last = index
                continue
        rows.append(PromptRow([], [], {}))
        rows[-1].add(index, ids, ())
        last = index
    return rows


def side_by_side(
    rows: Sequence[PromptRow], *, linear_tokens: float, longest: int, token_budget: int
) -> list[PromptRow]:
    """Short rows put together into long ones, so that little of a batch is filled up.

    Each row takes the fullest place that still has room for it (best fit, the longest first). Of many widths, the one
    is taken that makes the whole cheapest: wide rows waste less, but attention grows with the width.

    Args:
        linear_tokens: see :func:`shared_rows`.
        longest: no row is made longer than this.
        token_budget: of :func:`make_batches`.
    """
    widest = max(len(row.ids) for row in rows)
    best, least = [[number] for number in range(len(rows))], float("inf")
    widths = [*(widest + widest * step // _WIDTHS for step in range(_WIDTHS + 1)), longest]
    for width in dict.fromkeys(min(width, max(longest, widest)) for width in widths):
        places = _fitted(rows, width)
        cost = 0.0
        lengths = sorted((sum(len(rows[number].ids) for number in place) for place in places), reverse=True)
        for start, end in _runs(lengths, token_budget, None):
            cost += ((end - start) * lengths[start] + _BATCH_TOKENS) * (1 + lengths[start] / linear_tokens)
        if cost < least:
            best, least = places, cost
    made = []
    for members in best:
        made.append(PromptRow([], [], {}))
        for number in members:
            made[-1].append(rows[number])
    return made


def _fitted(rows: Sequence[PromptRow], width: int) -> list[list[int]]:
    """Which rows share a place of this width."""
    places: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # what is left of a place, and its number; ascending
    for number in sorted(range(len(rows)), key=lambda number: -len(rows[number].ids)):
        size = len(rows[number].ids)
        at = bisect.bisect_left(rooms, (size, -1))
        room, place = rooms.pop(at) if at < len(rooms) else (width, len(places))
        if place == len(places):
            places.append([])
        places[place].append(number)
        bisect.insort(rooms, (room - size, place))
    return places


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    alike = itertools.takewhile(lambda tokens: tokens[0] == tokens[1], zip(first, second, strict=False))
    return sum(1 for _tokens in alike)


def make_batches(
    rows: Sequence[PromptRow],
    prompts: Sequence[Readable],
    *,
    token_budget: int,
    most_rows: int | None = None,
    padding: Padding = "right",
) -> Iterator[Batch]:
    """Rows of like length together, as many as the budget allows (at least one), the longest first.

    Args:
        token_budget: most tokens in a batch, padding included.
        most_rows: most rows in a batch.
        padding: the side on which plain rows are filled up; trees are filled up on the right.
    """
    order = sorted(rows, key=lambda row: -len(row.ids))
    for _kind, alike in itertools.groupby(order, key=lambda row: row.is_tree):
        members = list(alike)
        for start, end in _runs([len(row.ids) for row in members], token_budget, most_rows):
            yield _batch(members[start:end], prompts, padding)


def _runs(lengths: Sequence[int], token_budget: int, most_rows: int | None) -> Iterator[tuple[int, int]]:
    """Where each batch begins and ends, of rows of these descending lengths."""
    start = 0
    while start < len(lengths):
        fitting = max(1, token_budget // max(1, lengths[start]))
        end = min(len(lengths), start + min(fitting, most_rows or fitting))
        yield start, end
        start = end


def _batch(rows: Sequence[PromptRow], prompts: Sequence[Readable], padding: Padding) -> Batch:
    inputs, offsets = padded([row.ids for row in rows], padding if not rows[0].is_tree else "right", 0)
    if rows[0].is_tree:
        inputs["position_ids"], inputs["attention_mask"] = _tree_inputs(rows, inputs["input_ids"].shape[1])
    places = []
    for number, row in enumerate(rows):
        for index, path in row.paths.items():
            columns = tuple(offsets[number] + column for column in path)
            read = tuple(columns[place] for place in prompts[index].read)
            places.append(Place(index, number, read, columns[1:] or columns))
    return Batch(inputs, tuple(places))


def _tree_inputs(rows: Sequence[PromptRow], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    # What fills up sees itself, so that no row of the softmax is empty.
    sees = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)
    for number, row in enumerate(rows):
        positions[number, : len(row.ids)] = torch.tensor(row.depths)
        for path in row.paths.values():
            columns = torch.tensor(path)
            sees[number, columns[:, None], columns[None, :]] = torch.ones(len(path), len(path), dtype=torch.bool).tril()
    return positions, sees[:, None]


def padded(
    sequences: Sequence[Sequence[int]], padding: Padding, pad_id: int
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """A padded batch (ids, mask, positions; [batch, width], int64) and where each sequence begins in its row."""
    width = max(len(ids) for ids in sequences)
    input_ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    offsets = []
    for row, ids in enumerate(sequences):
        offset = width - len(ids) if padding == "left" else 0
        input_ids[row, offset : offset + len(ids)] = torch.tensor(list(ids), dtype=torch.long)
        mask[row, offset : offset + len(ids)] = 1
        offsets.append(offset)
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}, offsets
