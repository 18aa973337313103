"""What the routed experts of a fused weight [experts, ...] read, expert by expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from patcher.architectures.config_keys import stated
from patcher.architectures.residual import attached


def outer(left: torch.Tensor, right: torch.Tensor, transposed: bool) -> torch.Tensor:
    """The outer product [hidden, width] of ``left`` [hidden] and ``right`` [width] ([experts, width]: one each)."""
    product = left[:, None] * right[..., None, :]
    return product.transpose(-1, -2) if transposed else product


@dataclass(frozen=True)
class RoutedCall:
    """One call of a module of fused experts: tokens [n, hidden], chosen experts and their weights, both [n, k]."""

    hidden: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class ExpertInputs:
    """What one expert's down projection reads.

    Attributes:
        tokens: [m] int64; rows of the call that were routed to the expert.
        weights: [m]; its weight for each of them.
        activations: [m, width].
    """

    tokens: torch.Tensor
    weights: torch.Tensor
    activations: torch.Tensor


@contextmanager
def watch_routing(module: nn.Module, calls: list[RoutedCall]) -> Iterator[None]:
    """While open, keep what a module of fused experts (tokens, indices, weights -> sum) is called with."""

    def hook(_module: nn.Module, args: Any, keywords: Mapping[str, Any]) -> None:
        given = [value.detach() for value in (*args, *keywords.values()) if isinstance(value, torch.Tensor)]
        if len(given) != 3:
            return
        whole = [value for value in given if not value.is_floating_point()]
        hidden, *rest = [value for value in given if value.is_floating_point()]
        if len(whole) == 1 and rest and hidden.ndim == 2 and whole[0].shape == rest[0].shape:
            calls.append(RoutedCall(hidden, whole[0], rest[0]))

    with attached(module.register_forward_pre_hook(hook, with_kwargs=True)):
        yield


def expert_inputs(
    module: nn.Module, parameter: torch.Tensor, call: RoutedCall, expert: int, width: int
) -> ExpertInputs | None:
    """What expert ``expert``'s slice of ``parameter`` is multiplied with in ``call``; None if it cannot be seen.

    The module is called with the tokens routed to this expert alone, in its plain form (one product an expert).
    """
    tokens, places = torch.where(call.chosen == expert)
    weights = call.weights[tokens, places]
    if not len(tokens):
        return ExpertInputs(tokens, weights, call.hidden.new_zeros(0, width))
    index = torch.full((len(tokens), 1), expert, dtype=call.chosen.dtype, device=call.chosen.device)
    ones = torch.ones_like(weights)[:, None]
    with _plain_experts(module), _Products(parameter) as products, torch.no_grad():
        module(call.hidden[tokens], index, ones)
    if len(products.seen) != 1:
        return None
    seen = products.seen[0]
    return ExpertInputs(tokens, weights, seen.reshape(-1, seen.shape[-1])) if len(seen) == len(tokens) else None


@contextmanager
def _plain_experts(module: nn.Module) -> Iterator[None]:
    config: Any = getattr(module, "config", None)
    before = stated(config, "_experts_implementation")
    if config is None or before is None or before == "eager":
        yield
        return
    config._experts_implementation = "eager"
    try:
        yield
    finally:
        config._experts_implementation = before


class _Products(TorchFunctionMode):
    """Keeps the other factor of every matrix product with a slice of ``parameter``."""

    def __init__(self, parameter: torch.Tensor) -> None:
        super().__init__()
        self.storage = parameter.untyped_storage().data_ptr()
        self.seen: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("linear", "matmul", "mm", "bmm", "__matmul__") and len(args) >= 2:
            other, weight = args[0], args[1]
            if isinstance(weight, torch.Tensor) and weight.untyped_storage().data_ptr() == self.storage:
                self.seen.append(other.detach())
        return func(*args, **(kwargs or {}))
