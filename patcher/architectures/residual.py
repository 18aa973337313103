"""The residual stream at a block of a stock class: read, or changed, while a forward pass goes by."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Change = Callable[[torch.Tensor], torch.Tensor | None]
"""Takes the residual stream, [rows, width, hidden]; what it returns goes on in its place, None leaves it as it is."""


def block_output(output: Any) -> torch.Tensor:
    """The residual stream out of a block's return value."""
    hidden: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return hidden


def block_input(inputs: Sequence[Any], keywords: Mapping[str, Any]) -> torch.Tensor:
    """The residual stream among what a block is called with."""
    hidden: torch.Tensor = inputs[0] if inputs else keywords["hidden_states"]
    return hidden


@contextlib.contextmanager
def attached(*handles: RemovableHandle) -> Iterator[None]:
    """Hooks that are removed at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def residual_hook(block: nn.Module, change: Change, *, entering: bool = False) -> Iterator[None]:
    """While open, ``change`` is called with what the block puts out or, if ``entering``, with what it takes in."""

    def after(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = change(block_output(output))
        return hidden if hidden is None or isinstance(output, torch.Tensor) else (hidden, *output[1:])

    def before(_module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        hidden = change(block_input(inputs, keywords))
        if hidden is None:
            return None
        return ((hidden, *inputs[1:]), keywords) if inputs else (inputs, {**keywords, "hidden_states": hidden})

    if entering:
        handle = block.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = block.register_forward_hook(after)
    with attached(handle):
        yield
