"""A stock model's forward pass: reading the residual stream between its blocks, adding to it, and stopping early."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from patcher.architectures.model_class import quiet_transformers

EMBEDDING = -1
"""The layer index of the residual stream that enters block 0."""


def block_output(output: Any) -> torch.Tensor:
    """The residual stream out of a block's return value."""
    hidden: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return hidden


class Enough(Exception):  # noqa: N818 - it reads as the event it is
    """Ends a forward pass that has given all that was asked for; never leaves :func:`read_blocks`."""


def read_blocks(
    model: nn.Module,
    blocks: str,
    layers: Collection[int],
    inputs: Mapping[str, torch.Tensor],
    use: Callable[[int, torch.Tensor], None],
) -> None:
    """Run the stock forward up to the last block of ``layers`` and no further: no later block, no LM head.

    Args:
        model: a causal LM in eval mode, under any device map.
        blocks: path of its list of decoder blocks.
        layers: 0-based block indices; -1 is the residual stream that enters block 0.
        inputs: of the forward pass.
        use: called with a layer and the residual stream after it, [rows, width, hidden], on its own device.
    """
    last = max(layers)

    def read(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            use(layer, block_output(output).detach())
            if layer == last:
                raise Enough

        return hook

    def read_entrance(_module: nn.Module, inputs: Any, keywords: Mapping[str, Any]) -> None:
        use(EMBEDDING, (inputs[0] if inputs else keywords["hidden_states"]).detach())
        if last == EMBEDDING:
            raise Enough

    handles = [
        model.get_submodule(f"{blocks}.0").register_forward_pre_hook(read_entrance, with_kwargs=True)
        if layer == EMBEDDING
        else model.get_submodule(f"{blocks}.{layer}").register_forward_hook(read(layer))
        for layer in layers
    ]
    try:
        with contextlib.suppress(Enough):
            forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()


def run_blocks(
    model: nn.Module, blocks: str, layers: Collection[int], inputs: Mapping[str, torch.Tensor]
) -> dict[int, torch.Tensor]:
    """What :func:`read_blocks` reads, all of it: layer -> [rows, width, hidden]."""
    seen: dict[int, torch.Tensor] = {}
    read_blocks(model, blocks, layers, inputs, seen.__setitem__)
    return seen


def forward(model: nn.Module, inputs: Mapping[str, torch.Tensor], **extra: Any) -> Any:
    """One stock forward pass without gradients or cache; positions are passed where the class takes them."""
    accepted = inspect.signature(model.forward).parameters
    device = next(model.parameters()).device
    if device.type == "meta":  # offloaded by accelerate, which moves inputs itself
        device = torch.device("cpu")
    chosen = {name: value.to(device) for name, value in inputs.items() if name in accepted}
    if "logits_to_keep" in accepted and "logits_to_keep" not in extra:
        extra["logits_to_keep"] = 1
    with torch.no_grad(), quiet_transformers():
        return model(**chosen, use_cache=False, **{name: value for name, value in extra.items() if name in accepted})


@contextlib.contextmanager
def steering_hooks(model: nn.Module, blocks: str, vectors: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """While open, the residual stream after block ``layer`` gains ``vectors[layer]`` ([hidden]) at every position.

    Layer -1 is the residual stream that enters block 0.
    """

    def adds(vector: torch.Tensor) -> Callable[..., Any]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            hidden = block_output(output)
            shifted = hidden + vector.to(hidden.device, hidden.dtype)
            return shifted if isinstance(output, torch.Tensor) else (shifted, *output[1:])

        return hook

    def adds_before(vector: torch.Tensor) -> Callable[..., Any]:
        def hook(_module: nn.Module, inputs: Any, keywords: dict[str, Any]) -> Any:
            hidden = inputs[0] if inputs else keywords["hidden_states"]
            shifted = hidden + vector.to(hidden.device, hidden.dtype)
            return ((shifted, *inputs[1:]), keywords) if inputs else (inputs, {**keywords, "hidden_states": shifted})

        return hook

    handles = [
        model.get_submodule(f"{blocks}.0").register_forward_pre_hook(adds_before(vector), with_kwargs=True)
        if layer == EMBEDDING
        else model.get_submodule(f"{blocks}.{layer}").register_forward_hook(adds(vector))
        for layer, vector in vectors.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def position_limit(model: nn.Module) -> int | None:
    """The number of positions of a model with learned positions; None where positions are computed."""
    config: Any = model.config
    for name in ("n_positions", "max_position_embeddings"):
        limit = getattr(config, name, None)
        if isinstance(limit, int):
            tables = [
                module.num_embeddings
                for path, module in model.named_modules()
                if isinstance(module, nn.Embedding) and any(mark in path for mark in ("wpe", "position"))
            ]
            return min(limit, *tables) if tables else None
    return None
