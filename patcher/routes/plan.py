"""A plan: what will be written where, decided before any work is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from patcher.checkpoint.slices import SliceOrder
from patcher.routes.constant import ConstantError as ConstantError

Reader = Callable[[str], torch.Tensor]
"""Reads one tensor of the base by its name on disk, in its stored dtype."""

FREE = "none"
"""What a copy costs at run time that costs nothing."""

STORED_LIMIT = 0.02
"""Largest relative error with which a copy may hold the vector; a build refuses more, and the verification too."""

RESIDUAL_LIMIT = 1e-3
"""Largest relative error of what the residual stream of an exact copy gains, at any position."""


@dataclass(frozen=True)
class TensorWrite:
    """One tensor that the copy gains or changes.

    Attributes:
        name: its key on disk in the copy.
        parameter: its name in the stock class that reads the copy.
        kind: ``added`` to what the base stores there, or ``created``.
        layer: whose edit it carries, in the base's numbering (-1: the embedding); None for a tensor that carries none.
        factor: residual gain per unit of the tensor.
        shape: [hidden], [rows, hidden] where every row holds the vector, [hidden, n] with ``right`` ([experts,
            hidden, n] where every expert holds the same), or its own.
        dtype: safetensors dtype that is written.
        offset: a created carrier holds ``offset + v / factor`` (a norm that multiplies by 1 + weight: -1).
        right: [n] fp32; the tensor carries the outer product of ``v / factor`` and this, [hidden, n]. Or [experts, n],
            one for each.
        transposed: the outer product lies as [n, hidden] (the Conv1D of GPT-2).
        spread: [hidden] fp32; the vector is multiplied by this first (the inverse of a norm's weight that follows).
        index: which expert of a fused class parameter [experts, hidden, n] the tensor on disk is.
        make: the content of a tensor that carries no vector; None means zeros.
        holds: the same in words.
    """

    name: str
    parameter: str
    kind: Literal["added", "created"]
    layer: int | None
    factor: float
    shape: tuple[int, ...]
    dtype: str
    offset: float = 0.0
    right: torch.Tensor | None = field(default=None, compare=False)
    transposed: bool = False
    spread: torch.Tensor | None = field(default=None, compare=False)
    index: int | None = None
    make: Callable[[Reader], torch.Tensor] | None = field(default=None, compare=False)
    holds: str = "zeros"

    @classmethod
    def beside(
        cls,
        name: str,
        parameter: str,
        shape: tuple[int, ...],
        dtype: str,
        make: Callable[[Reader], torch.Tensor] | None = None,
        holds: str = "zeros",
    ) -> TensorWrite:
        """A created tensor that carries no vector."""
        return cls(name, parameter, "created", None, 1.0, shape, dtype, make=make, holds=holds)

    def as_json(self) -> dict[str, Any]:
        """For the manifest; the numbers of ``right`` and ``spread`` are kept in ``steering.safetensors``."""
        result: dict[str, Any] = {
            "name": self.name,
            "parameter": self.parameter,
            "kind": self.kind,
            "layer": self.layer,
            "factor": self.factor,
            "dtype": self.dtype,
            "shape": list(self.shape),
        }
        if self.offset:
            result["offset"] = self.offset
        if self.right is not None:
            result |= {"outer": True, "transposed": self.transposed}
        if self.spread is not None:
            result["spread"] = True
        if self.index is not None:
            result["index"] = self.index
        return result


@dataclass(frozen=True)
class NextBest:
    """The route that a recipe would get if it did not get the one it gets.

    Attributes:
        route: its name.
        exact: whether the stock model computes exactly what the hook computes.
        cost: what it costs at run time, in words.
        stacks: stack -> native, backend or no.
        constant: see :class:`Plan`.
    """

    route: str
    exact: bool
    cost: str
    stacks: Mapping[str, str]
    constant: ConstantError | None = None

    @classmethod
    def of(cls, plan: Plan) -> NextBest:
        return cls(plan.route, plan.exact, plan.cost, plan.stacks, plan.constant)

    def as_json(self) -> dict[str, Any]:
        constant = None if self.constant is None else self.constant.as_json()
        stacks = dict(self.stacks)
        return {"name": self.route, "exact": self.exact, "cost": self.cost, "stacks": stacks, "constant": constant}


@dataclass(frozen=True)
class Plan:
    """How a set of edits is stored in one checkpoint by one route.

    Attributes:
        route: the route's name.
        architecture: the stock class that reads the copy.
        blocks: path of the list of decoder blocks in the base's class.
        sites: layer -> module of the copy that carries the edit.
        tensors: everything that is new or changed.
        stacks: stack -> native, backend or no.
        reason: why this route was chosen.
        exact: whether the stock model computes exactly what the hook computes.
        cost: what it costs at run time, in words; :data:`FREE` where it costs nothing.
        config_changes: config keys and their new values; None removes the key.
        dropped: names on disk that the copy lacks; the same name may be created anew.
        renamed: name on disk in the base -> in the copy; the bytes are copied.
        grown: name on disk -> the order of the slices that this tensor of the base has in the copy.
        config: a whole new config.json, instead of changes.
        copy_layers: layer -> the block of the copy after which the residual stream holds the edit; by default the same.
        inserted: layer -> all blocks of the copy that are inserted after it.
        residual: how the copy's residual stream compares with the base's: ``same``, or ``centred`` (its mean over the
            hidden dimension is removed).
        streams: how many residual streams the blocks hand on; each of them gains the vector.
        tokenizer_changes: keys of tokenizer_config.json that keep the ids as they are beside another model type.
        warnings: what users of the copy must know; for the card.
        advice: what whoever builds the copy could choose instead; not for the card.
        next_best: the route that is next in the planner's order; None where there is none, or nobody asked.
        fit: of a fitted route, what was measured on held-out activations.
        constant: how far a carrier's constant is off; None where it is exact.
    """

    route: str
    architecture: str
    blocks: str
    sites: Mapping[int, str]
    tensors: tuple[TensorWrite, ...]
    stacks: Mapping[str, str]
    reason: str
    exact: bool = True
    cost: str = FREE
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    renamed: Mapping[str, str] = field(default_factory=dict)
    grown: Mapping[str, SliceOrder] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    copy_layers: Mapping[int, int] = field(default_factory=dict)
    inserted: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    residual: Literal["same", "centred"] = "same"
    streams: int = 1
    tokenizer_changes: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    next_best: NextBest | None = None
    fit: Mapping[str, Any] | None = None
    constant: ConstantError | None = None

    @property
    def carriers(self) -> tuple[TensorWrite, ...]:
        """The tensors that hold a vector."""
        return tuple(tensor for tensor in self.tensors if tensor.layer is not None)

    @property
    def free(self) -> bool:
        """Whether the copy costs nothing at run time."""
        return self.cost == FREE

    @property
    def is_own_bias(self) -> bool:
        """Whether the edits are exact biases that the class that reads the copy itself has, in blocks as they were."""
        in_place = all(layer >= 0 and self.copy_layers.get(layer, layer) == layer for layer in self.sites)
        return self.exact and in_place and all(tensor.parameter.endswith("bias") for tensor in self.carriers)

    def in_copy(self, vector: torch.Tensor) -> torch.Tensor:
        """What the copy's residual stream gains where the base's gains ``vector`` ([hidden])."""
        return vector - vector.mean() if self.residual == "centred" else vector

    def as_json(self) -> dict[str, Any]:
        """For ``--dry-run`` and ``steering.json``."""
        others = [tensor for tensor in self.tensors if tensor.layer is None]
        zeros = [tensor.name for tensor in others if tensor.make is None]
        result: dict[str, Any] = {
            "name": self.route,
            "exact": self.exact,
            "cost": self.cost,
            "architecture": self.architecture,
            "blocks": self.blocks,
            "tensors": [tensor.as_json() for tensor in self.carriers],
            "zeros": {"count": len(zeros), "names": zeros},
            "derived": {tensor.name: tensor.holds for tensor in others if tensor.make is not None},
            "dropped": sorted(self.dropped),
            "renamed": dict(self.renamed),
            "config_changes": dict(self.config_changes),
            "tokenizer_changes": dict(self.tokenizer_changes),
            "stacks": dict(self.stacks),
            "reason": self.reason,
            "copy_layers": {str(layer): self.copy_layers.get(layer, layer) for layer in self.sites},
            "inserted": {str(layer): list(blocks) for layer, blocks in self.inserted.items()},
            "residual": self.residual,
            "warnings": list(self.warnings),
            "advice": list(self.advice),
            "next_best": None if self.next_best is None else self.next_best.as_json(),
        }
        if self.streams > 1:
            result["streams"] = self.streams
        if self.grown:
            result["grown"] = {name: order.as_json() for name, order in self.grown.items()}
        if self.constant is not None:
            result["constant"] = self.constant.as_json()
        return {**result, "fit": dict(self.fit)} if self.fit is not None else result


class NotApplicable(Exception):  # noqa: N818 - a finding, not a failure
    """A route does not fit this architecture; the text says why."""


def refuse_embedding(layers: Sequence[int], why: str) -> None:
    """Of a route that edits blocks: refuse an edit before block 0.

    Raises:
        NotApplicable: with ``why`` after what such an edit belongs to.
    """
    if any(layer < 0 for layer in layers):
        raise NotApplicable(f"an edit before block 0 belongs to the embedding{why}")
