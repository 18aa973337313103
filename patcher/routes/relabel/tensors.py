"""The tensors of a relabelled checkpoint: each one of the target class, and how it follows from one of the source."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from patcher.routes.relabel.config import factor_of, head_dim, rotary_scale
from patcher.routes.relabel.guards import rotary_fraction

Step = Sequence[Any]
"""An operation and its argument, such as ``["rows", "q"]``."""


@dataclass(frozen=True)
class Derivation:
    """How one parameter of the target follows from the source.

    Attributes:
        target: the target's parameter.
        source: the source's parameter, or None for a constant.
        steps: the operations, in order; none: the bytes are the same.
        fill: the constant.
    """

    target: str
    source: str | None
    steps: tuple[Step, ...] = ()
    fill: float = 0.0

    def rounds(self, config: Any) -> bool:
        """Whether half precision would round the result, although it holds what it is made of.

        Args:
            config: the source's.
        """
        names = {step[0] for step in self.steps}
        factors = [factor_of(argument, config) for name, argument in self.steps if name == "times"]
        # A power of two changes no digit.
        scaled = any(math.frexp(factor)[0] != 0.5 for factor in factors)
        return scaled or bool(names & {"add", "centre"}) or ("scale_rotated" in names and rotary_scale(config) != 1.0)

    def words(self, source_name: str) -> str:
        """What the tensor holds, for people; ``source_name`` is the source's key on disk."""
        if self.source is None:
            return "zeros" if self.fill == 0.0 else f"all {self.fill:g}"
        described = [_WORDS[step[0]].format(step[1]) for step in self.steps]
        return ", ".join([f"`{source_name}`", *described])


def derivations(
    rules: Mapping[str, Mapping[str, Any]], source: Mapping[str, Any], target: Mapping[str, Any]
) -> tuple[list[Derivation], list[str]]:
    """How every parameter of the target follows from the source's.

    Args:
        rules: target pattern (``*`` stands for a number) -> {"from": source pattern, "do": steps} or {"fill": number}.
        source: the source's parameters, by name.
        target: the target's; those tied to another left out.

    Returns:
        The derivations, and the target's parameters that no parameter of the source gives: no other than biases
        that are zeros may be among them.
    """
    compiled = [(re.compile(re.escape(key).replace(r"\*", r"(\d+)")), rule) for key, rule in rules.items()]
    found, missing = [], []
    for name in target:
        rule, numbers = next(
            ((rule, match.groups()) for pattern, rule in compiled if (match := pattern.fullmatch(name))), ({}, ())
        )
        if "fill" in rule:
            found.append(Derivation(name, None, fill=float(rule["fill"])))
            continue
        origin = _numbered(rule["from"], numbers) if "from" in rule else name
        if origin in source:
            found.append(Derivation(name, origin, tuple(rule.get("do", ()))))
        else:
            missing.append(name)
    return found, missing


def _numbered(pattern: str, numbers: Sequence[str]) -> str:
    for number in numbers:
        pattern = pattern.replace("*", number, 1)
    return pattern


def derive(tensor: torch.Tensor, steps: Sequence[Step], config: Any) -> torch.Tensor:
    """Apply ``steps`` to a tensor of the source whose config is ``config``; fp32 where the result would be rounded."""
    for name, argument in steps:
        tensor = OPERATIONS[name](tensor, argument, config)
    return tensor.contiguous()


def _rows(tensor: torch.Tensor, part: str, config: Any) -> torch.Tensor:
    """[rows, n] -> the rows of one of the matrices that were stacked."""
    half = tensor.shape[0] // 2
    queries, keys = (count * head_dim(config) for count in (config.num_attention_heads, config.num_key_value_heads))
    starts = {
        "first half": (0, half),
        "second half": (half, 2 * half),
        "q": (0, queries),
        "k": (queries, queries + keys),
        "v": (queries + keys, queries + 2 * keys),
    }
    start, end = starts[part]
    return tensor[start:end]


def _rotary(tensor: torch.Tensor, layout: str, config: Any) -> torch.Tensor:
    """[heads * head_dim, ...] -> the same rows in the order of an embedding that rotates row i with row i + half.

    The source rotates only the first rows of each head, as two ``halves`` or as neighbouring ``pairs``; the others
    follow after them, where the target's factors leave them unrotated.
    """
    width = head_dim(config)
    rotated = int(width * rotary_fraction(config))
    if layout == "pairs":
        first, second = list(range(0, rotated, 2)), list(range(1, rotated, 2))
    else:
        first, second = list(range(rotated // 2)), list(range(rotated // 2, rotated))
    rest = list(range(rotated, width))
    order = torch.tensor(first + rest[: len(rest) // 2] + second + rest[len(rest) // 2 :])
    heads = tensor.reshape(-1, width, *tensor.shape[1:])
    return heads.index_select(1, order).flatten(0, 1)


def _scale_rotated(tensor: torch.Tensor, power: float, config: Any) -> torch.Tensor:
    """[heads * head_dim, ...] times a power of the source's rotary scale, in the rows that it rotates."""
    scale = rotary_scale(config) ** power
    if scale == 1.0:
        return tensor
    width = head_dim(config)
    heads = tensor.float().reshape(-1, width, *tensor.shape[1:]).clone()
    heads[:, : int(width * rotary_fraction(config))] *= scale
    return heads.flatten(0, 1)


def _times(tensor: torch.Tensor, name: str, config: Any) -> torch.Tensor:
    """Times a factor of the config's; in the stored dtype where that changes no digit."""
    factor = factor_of(name, config)
    return tensor * factor if math.frexp(factor)[0] == 0.5 else tensor.float() * factor


def _turn(tensor: torch.Tensor, _argument: Any, config: Any) -> torch.Tensor:
    """[experts, out, in] -> [experts, in, out]."""
    return tensor.transpose(-1, -2)


def _add(tensor: torch.Tensor, number: float, config: Any) -> torch.Tensor:
    return tensor.float() + number


def _centre(tensor: torch.Tensor, dim: int, config: Any) -> torch.Tensor:
    """The mean over the residual's dimension taken off, fp32."""
    return tensor.float() - tensor.mean(dim, keepdim=True, dtype=torch.float64).float()


OPERATIONS: Mapping[str, Callable[[torch.Tensor, Any, Any], torch.Tensor]] = {
    "rows": _rows,
    "rotary": _rotary,
    "scale_rotated": _scale_rotated,
    "times": _times,
    "turn": _turn,
    "add": _add,
    "centre": _centre,
}
"""Every operation by the name that relabels.json uses."""

_WORDS = {
    "rows": "its rows of {}",
    "rotary": "rows of each head reordered for a full rotary embedding (from {})",
    "scale_rotated": "its rotated rows times the rotary scale to the power of {}",
    "times": "times its {}",
    "turn": "each expert's {} turned round",
    "add": "plus {}",
    "centre": "its mean over the residual's dimension ({}) taken off",
}
