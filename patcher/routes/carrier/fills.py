"""What the tensors of an inserted block hold, stated so that it can be made in any size.

The block must add the vector to whatever it gets, so its output projection has to see a constant. Where the block has
no bias to take one from, it is made of the norm. The sum of squares of n = norm(h) is H, the width. A gate f with
f(x) - f(-x) = x (SiLU, GELU) gives f(x) x - f(-x) x = x^2, in two neurons a coordinate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

Right = Literal["gated", "mirrored", "first"]
"""What the output projection reads: pairs of opposite sign, pairs of one sign, or its first input alone."""


@dataclass(frozen=True)
class Fill:
    """The content of one parameter of the inserted block.

    Attributes:
        kind: ``zeros``; ``copied`` from the block's template; ``constant`` everywhere; ``pairs``: rows +e_i and -e_i
            (a part that is ``up`` has +e_i twice); ``column``: the first column alone; ``flat``: the output
            projection of a constant that is the same in every coordinate; ``carrier``: what holds the vector;
            ``pinned``: a constant for the first ``holders`` experts, which are then selected; ``opposed``: rows of a
            router, +u for the first ``shares`` experts and -u for as many after them; ``unmixed``: zeros, and at the
            end a matrix over ``streams`` residual streams, +value on its diagonal and -value beside it, of which a
            softmax is the identity; ``first stream``: a norm's weights over all streams, under which it silences all
            but the first.
        value: of a constant, a column, what is pinned, the size of u, or what a flat projection returns; of pairs,
            what the up rows are multiplied by (0: nothing); of the first stream, the weight of a norm that does
            nothing.
        second: of a column, what the column beside it holds.
        slope: of pairs, what the gate rows are multiplied by.
        parts: of pairs, what lies in the matrix: ``gate`` and ``up``.
        interleaved: the rows of the parts take turns.
        right: what an output projection reads.
        transposed: the matrix lies as [in, out].
        factor: of a carrier, residual gain per unit under the sizes that it was measured at.
        offset: of a carrier, what is added to the vector's share.
        shares: among how many experts the coordinates are split; expert e has the share e modulo this.
        holders: how many experts, the first ones, hold anything; 0: all of them.
        after: of the coordinates, how many first ones are not held here but elsewhere.
        streams: of residual streams, how many there are.
    """

    kind: Literal[
        "zeros", "copied", "constant", "pairs", "column", "flat", "carrier", "pinned", "opposed", "unmixed",
        "first stream",
    ]  # fmt: skip
    value: float = 0.0
    slope: float = 1.0
    second: float = 0.0
    parts: tuple[str, ...] = ()
    interleaved: bool = False
    right: Right | None = None
    transposed: bool = False
    factor: float = 1.0
    offset: float = 0.0
    shares: int = 1
    holders: int = 0
    after: int = 0
    streams: int = 1

    def share(self, expert: int | None, hidden: int) -> tuple[int, int]:
        """The first coordinate that an expert sees, and how many; outside of experts all that are held."""
        rest = hidden - self.after
        if expert is None:
            return self.after, rest
        if self.holders and expert >= self.holders:
            return self.after, 0
        part = expert % self.shares
        first = rest * part // self.shares
        return self.after + first, rest * (part + 1) // self.shares - first

    def rights(self, shape: tuple[int, ...], hidden: int, expert: int | None = None) -> torch.Tensor:
        """What an output projection of this shape reads: [inner] fp32, or [experts, inner] where experts differ."""
        inner = shape[-2] if self.transposed else shape[-1]
        right = self.right or "first"
        if len(shape) < 3 or not self.holders:
            return right_of(right, inner, self.share(expert, hidden)[1])
        return torch.stack([right_of(right, inner, self.share(number, hidden)[1]) for number in range(shape[0])])

    @property
    def holds(self) -> str:
        """The content in words, for a manifest."""
        return {
            "constant": f"{self.value:g} everywhere",
            "pairs": "rows +e_i and -e_i" if self.parts != ("up",) else "rows e_i, scaled, twice",
            "column": "its first column alone",
            "flat": "the projection of a constant",
            "copied": "the template's own values",
            "pinned": f"{self.value:g} for the first {self.holders} experts",
            "unmixed": f"zeros, and at the end {self.value:g} on the diagonal of a matrix, -{self.value:g} beside it",
            "first stream": f"{self.value:g} for the first residual stream, {self.value - 1:g} for the others",
            "opposed": f"one row for the first {self.shares} experts, and its negative for as many after them",
        }.get(self.kind, self.kind)


def balance(hidden: int) -> float:
    """The scale of the up rows: a power of two that keeps the projection's entries near v / sqrt(hidden)."""
    return 2.0 ** -round(math.log2(hidden) / 2)


def gain(right: Right, hidden: int) -> float:
    """What an output projection's unit row returns for a norm without a factor of its own."""
    return {"gated": hidden * balance(hidden), "mirrored": float(hidden), "first": 1.0}[right]


def right_of(right: Right, inner: int, hidden: int) -> torch.Tensor:
    """[inner] fp32: which inputs of the output projection are read, and with which sign."""
    row = torch.zeros(inner)
    if right == "first":
        row[0] = 1.0
    else:
        pairs = min(hidden, inner // 2)
        row[:pairs] = 1.0
        row[pairs : 2 * pairs] = -1.0 if right == "gated" else 1.0
    return row


def content(
    fill: Fill, shape: tuple[int, ...], hidden: int, vector: torch.Tensor | None = None, expert: int | None = None
) -> torch.Tensor:
    """``fill`` as a tensor of ``shape``, fp32; the leading dimension (experts) holds the same unless they are split.

    Args:
        fill: anything but ``copied``.
        shape: of the parameter.
        hidden: width of the residual stream.
        vector: [hidden], for a carrier.
        expert: which one a matrix is; None where there are none, or all in one tensor.
    """
    if fill.kind in ("zeros", "constant"):
        return torch.full(shape, fill.value)
    if fill.kind == "pinned":
        row = torch.zeros(shape)
        row[..., : fill.holders] = fill.value
        return row
    if fill.kind == "opposed":
        return _opposed(fill, shape)
    if fill.kind == "unmixed":
        row, count = torch.zeros(shape), fill.streams
        row[-count * count :] = (fill.value * (2 * torch.eye(count) - 1)).flatten()
        return row
    if fill.kind == "first stream":
        row = torch.full(shape, fill.value - 1.0)
        row[:hidden] = fill.value
        return row
    if len(shape) == 1:
        if vector is None:
            raise ValueError("a carrier needs a vector")
        return fill.offset + vector / fill.factor
    if len(shape) == 3 and fill.holders:
        whole = torch.zeros(shape)
        for number in range(min(fill.holders, shape[0])):
            whole[number] = content(fill, shape[1:], hidden, vector, number)
        return whole
    rows, columns = (shape[-1], shape[-2]) if fill.transposed else (shape[-2], shape[-1])
    first, count = fill.share(expert, hidden)
    if fill.kind == "pairs":
        matrix = _pairs(fill, rows, hidden, first, count)
    elif fill.kind == "column":
        matrix = torch.zeros(rows, columns)
        matrix[:, 0] = fill.value
        if fill.second:
            matrix[:, 1] = fill.second
    else:
        right = fill.right or "first"
        row = right_of(right, columns, count)
        if fill.kind == "flat":
            left = torch.full((rows,), fill.value / gain(right, hidden))
        elif vector is None:
            raise ValueError("a carrier needs a vector")
        else:
            left = vector / fill.factor
        matrix = torch.outer(left, row)
    matrix = matrix.T if fill.transposed else matrix
    return matrix.expand(shape).contiguous()


def _opposed(fill: Fill, shape: tuple[int, ...]) -> torch.Tensor:
    """Rows +u and -u. No two coordinates of u weigh the same, so that hardly a residual is at right angles to it."""
    width = shape[-1]
    steps = torch.arange(1, width + 1, dtype=torch.float64) * ((math.sqrt(5) - 1) / 2) % 1.0
    signs = torch.where(torch.arange(width) * math.sqrt(2) % 1.0 < 0.5, 1.0, -1.0)
    row = (fill.value / math.sqrt(width) * signs * (1.0 + steps)).float()
    matrix = torch.zeros(shape)
    matrix[: fill.shares] = row
    matrix[fill.shares : 2 * fill.shares] = -row
    return matrix


def _pairs(fill: Fill, rows: int, hidden: int, first: int, count: int) -> torch.Tensor:
    inner = rows // len(fill.parts)
    # With fewer than two neurons a coordinate the sum of squares is a share of it, which is enough before a norm.
    pairs = min(count, inner // 2)
    up = torch.zeros(inner, hidden)
    index = torch.arange(pairs)
    up[index, first + index] = 1.0
    up[pairs + index, first + index] = 1.0
    gate = up.clone()
    gate[:pairs] *= fill.slope
    gate[pairs:] *= -fill.slope
    # In place: these are the largest tensors that are made.
    parts = [gate if part == "gate" else up.mul_(balance(hidden) * (fill.value or 1.0)) for part in fill.parts]
    if len(parts) == 1:
        return parts[0]
    return torch.stack(parts, 1).reshape(rows, hidden) if fill.interleaved else torch.cat(parts)


def matches(tensor: torch.Tensor, hidden: int, whole: Fill, vector: torch.Tensor) -> Fill | None:
    """What of ``whole``, of its parts and of their transposes a tensor holds; None for something else."""
    return all_match({None: tensor}, hidden, whole, vector)


def all_match(
    tensors: Mapping[int | None, torch.Tensor], hidden: int, whole: Fill, vector: torch.Tensor
) -> Fill | None:
    """The same for one tensor an expert, by its number."""
    for fill in _variants(whole):
        if all(_holds(tensor, fill, hidden, vector, expert) for expert, tensor in tensors.items()):
            return fill
    return None


def _holds(tensor: torch.Tensor, fill: Fill, hidden: int, vector: torch.Tensor, expert: int | None) -> bool:
    shape = tuple(tensor.shape)
    if len(shape) == 1 and fill.kind not in ("zeros", "constant", "carrier", "pinned", "unmixed", "first stream"):
        return False
    if (len(shape) == 1) != (fill.right is None) and fill.kind == "carrier":
        return False
    try:
        wanted = content(fill, shape, hidden, vector, expert)
    except (IndexError, RuntimeError):
        return False
    return wanted.shape == tensor.shape and torch.equal(wanted, tensor)


def _variants(fill: Fill) -> list[Fill]:
    found = [Fill("zeros")]
    parts = {fill.parts, *((part,) for part in fill.parts), fill.parts[::-1]} if fill.kind == "pairs" else {()}
    for part in sorted(parts, key=len, reverse=True):
        for transposed in (fill.transposed, not fill.transposed):
            for interleaved in (False, True) if len(part) > 1 else (False,):
                found.append(replace(fill, parts=part, interleaved=interleaved, transposed=transposed))
    return found
