"""The residual stream at a block of a stock class: read, or changed, while a forward pass goes by.

A block may hand on several residual streams (hyper-connections), as [rows, tokens, streams, hidden] or side by side as
[rows, tokens, streams * hidden]. A vector is then added to each of them, and their mean is what is read: it gains the
vector where every stream does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from patcher.architectures.config_keys import whole_number

Change = Callable[[torch.Tensor], torch.Tensor | None]
"""Takes the residual stream, [rows, width, hidden]; what it returns goes on in its place, None leaves it as it is.

Several streams come as the block has them.
"""


def stream_width(model: nn.Module) -> int:
    """The width of one residual stream of a causal LM."""
    config: Any = model.config
    return int(config.get_text_config().hidden_size)


def streams_of(hidden: torch.Tensor, width: int) -> torch.Tensor:
    """Several residual streams as [rows, tokens, streams, width]; one alone as it is, [rows, tokens, width]."""
    several = hidden.ndim == 3 and hidden.shape[-1] > width and hidden.shape[-1] % width == 0
    return hidden.reshape(*hidden.shape[:-1], -1, width) if several else hidden


def mean_stream(hidden: torch.Tensor, width: int) -> torch.Tensor:
    """What is read of a block's residual streams: their mean, [rows, tokens, width] in their dtype; of one, itself."""
    streams = streams_of(hidden, width)
    return streams if streams.ndim == 3 else streams.float().mean(dim=2).to(hidden.dtype)


def gained(hidden: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """The residual streams, each of which gains ``vector``, in the dtype and on the device that they have.

    Args:
        hidden: as a block has them.
        vector: [hidden], or [rows, 1 or tokens, hidden].
    """
    vector = vector.to(hidden.device, hidden.dtype)
    streams = streams_of(hidden, vector.shape[-1])
    if streams.ndim == 4 and vector.ndim == 3:
        vector = vector.unsqueeze(2)
    return (streams + vector).reshape(hidden.shape) if streams.ndim != hidden.ndim else hidden + vector


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


def streams_first(config: Any) -> bool:
    """Whether blocks of a class hand on several streams as [streams, rows, tokens, hidden]: AltUp, as in Gemma 3n."""
    return (whole_number(config, "altup_num_inputs") or 0) > 1


def in_rows(change: Change, config: Any) -> Change:
    """The same change, of what a block of this config has: streams that come one after the other are put in order."""
    return _with_rows_first(change) if streams_first(config) else change


def _with_rows_first(change: Change) -> Change:
    """The same change, of streams that the block has one after the other."""

    def changed(hidden: torch.Tensor) -> torch.Tensor | None:
        new = change(hidden.permute(1, 2, 0, 3))
        return None if new is None else new.permute(2, 0, 1, 3)

    return changed


@contextlib.contextmanager
def residual_hook(block: nn.Module, change: Change, *, entering: bool = False) -> Iterator[None]:
    """While open, ``change`` is called with what the block puts out or, if ``entering``, with what it takes in."""

    change = in_rows(change, getattr(block, "config", None))

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
