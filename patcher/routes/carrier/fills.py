"""What the tensors of an inserted block hold, stated so that it can be made in any size.

The block must add the vector to whatever it gets, so its output projection has to see a constant. Where the block has
no bias to take one from, it is made of the norm. The sum of squares of n = norm(h) is H, the width. A gate f with
f(x) - f(-x) = x (SiLU, GELU) gives f(x) x - f(-x) x = x^2, in two neurons a coordinate.
"""

from __future__ import annotations

import math
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
            projection of a constant that is the same in every coordinate; ``carrier``: what holds the vector.
        value: of a constant, a column, or what a flat projection returns.
        parts: of pairs, what lies in the matrix: ``gate`` and ``up``.
        interleaved: the rows of the parts take turns.
        right: what an output projection reads.
        transposed: the matrix lies as [in, out].
        factor: of a carrier, residual gain per unit under the sizes that it was measured at.
        offset: of a carrier, what is added to the vector's share.
    """

    kind: Literal["zeros", "copied", "constant", "pairs", "column", "flat", "carrier"]
    value: float = 0.0
    parts: tuple[str, ...] = ()
    interleaved: bool = False
    right: Right | None = None
    transposed: bool = False
    factor: float = 1.0
    offset: float = 0.0

    @property
    def holds(self) -> str:
        """The content in words, for a manifest."""
        return {
            "constant": f"{self.value:g} everywhere",
            "pairs": "rows +e_i and -e_i" if self.parts != ("up",) else "rows e_i, scaled, twice",
            "column": "its first column alone",
            "flat": "the projection of a constant",
            "copied": "the template's own values",
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


def content(fill: Fill, shape: tuple[int, ...], hidden: int, vector: torch.Tensor | None = None) -> torch.Tensor:
    """``fill`` as a tensor of ``shape``, fp32; the leading dimensions (experts) all hold the same.

    Args:
        fill: anything but ``copied``.
        shape: of the parameter.
        hidden: width of the residual stream.
        vector: [hidden], for a carrier.
    """
    if fill.kind in ("zeros", "constant"):
        return torch.full(shape, fill.value)
    if len(shape) == 1:
        if vector is None:
            raise ValueError("a carrier needs a vector")
        return fill.offset + vector / fill.factor
    rows, columns = (shape[-1], shape[-2]) if fill.transposed else (shape[-2], shape[-1])
    if fill.kind == "pairs":
        matrix = _pairs(fill, rows, columns)
    elif fill.kind == "column":
        matrix = torch.zeros(rows, columns)
        matrix[:, 0] = fill.value
    else:
        right = fill.right or "first"
        row = right_of(right, columns, hidden)
        if fill.kind == "flat":
            left = torch.full((rows,), fill.value / gain(right, hidden))
        elif vector is None:
            raise ValueError("a carrier needs a vector")
        else:
            left = vector / fill.factor
        matrix = torch.outer(left, row)
    matrix = matrix.T if fill.transposed else matrix
    return matrix.expand(shape).contiguous()


def _pairs(fill: Fill, rows: int, hidden: int) -> torch.Tensor:
    inner = rows // len(fill.parts)
    # With fewer than two neurons a coordinate the sum of squares is a share of it, which is enough before a norm.
    pairs = min(hidden, inner // 2)
    up = torch.zeros(inner, hidden)
    index = torch.arange(pairs)
    up[index, index] = 1.0
    up[pairs + index, index] = 1.0
    gate = up.clone()
    gate[pairs:] *= -1
    # In place: these are the largest tensors that are made.
    parts = [gate if part == "gate" else up.mul_(balance(hidden)) for part in fill.parts]
    if len(parts) == 1:
        return parts[0]
    return torch.stack(parts, 1).reshape(rows, hidden) if fill.interleaved else torch.cat(parts)


def matches(tensor: torch.Tensor, hidden: int, whole: Fill, vector: torch.Tensor) -> Fill | None:
    """What of ``whole``, of its parts and of their transposes a tensor holds; None for something else."""
    shape = tuple(tensor.shape)
    for fill in _variants(whole):
        if len(shape) == 1 and fill.kind not in ("zeros", "constant", "carrier"):
            continue
        if (len(shape) == 1) != (fill.right is None) and fill.kind == "carrier":
            continue
        try:
            wanted = content(fill, shape, hidden, vector)
        except (IndexError, RuntimeError):
            continue
        if wanted.shape == tensor.shape and torch.equal(wanted, tensor):
            return fill
    return None


def _variants(fill: Fill) -> list[Fill]:
    found = [Fill("zeros")]
    parts = {fill.parts, *((part,) for part in fill.parts), fill.parts[::-1]} if fill.kind == "pairs" else {()}
    for part in sorted(parts, key=len, reverse=True):
        for transposed in (fill.transposed, not fill.transposed):
            for interleaved in (False, True) if len(part) > 1 else (False,):
                found.append(replace(fill, parts=part, interleaved=interleaved, transposed=transposed))
    return found
