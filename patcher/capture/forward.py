"""A stock model's forward pass: reading the residual stream between its blocks, adding to it, and stopping early."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from patcher.architectures.config_keys import stated
from patcher.architectures.decoder import decoder_config
from patcher.architectures.model_class import quiet_transformers
from patcher.architectures.residual import Change, gained, mean_stream, residual_hook, stream_width
from patcher.architectures.towers import towers_of
from patcher.capture.products import fast_products

OF_TEXT = ("input_ids", "attention_mask", "position_ids")
"""The inputs of a pass over text; what else there is stands for an image."""
EMBEDDING = -1
"""The layer index of the residual stream that enters block 0."""


class Enough(Exception):  # noqa: N818 - it reads as the event it is
    """Ends a forward pass that has given all that was asked for; never leaves whoever began it."""


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
        use: called with a layer and the residual stream after it, [rows, width, hidden], on its own device; of several
            streams, with their mean.
    """
    width = stream_width(model)
    _pass_by(model, blocks, layers, inputs, lambda layer, hidden: use(layer, mean_stream(hidden, width)))


def _pass_by(
    model: nn.Module,
    blocks: str,
    layers: Collection[int],
    inputs: Mapping[str, torch.Tensor],
    use: Callable[[int, torch.Tensor], None],
) -> None:
    last = max(layers)

    def read(layer: int, hidden: torch.Tensor) -> None:
        use(layer, hidden.detach())
        if layer == last:
            raise Enough

    changes = {layer: functools.partial(read, layer) for layer in layers}
    with _residual_hooks(model, blocks, changes), contextlib.suppress(Enough):
        forward(model, inputs)


def run_blocks(
    model: nn.Module, blocks: str, layers: Collection[int], inputs: Mapping[str, torch.Tensor]
) -> dict[int, torch.Tensor]:
    """What blocks hand on: layer -> [rows, width, hidden]; several streams as the class has them."""
    seen: dict[int, torch.Tensor] = {}
    _pass_by(model, blocks, layers, inputs, seen.__setitem__)
    return seen


def forward(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], *, logits_to_keep: int | torch.Tensor | None = None
) -> Any:
    """One stock forward pass without gradients or cache; positions are passed where the class takes them.

    What stands for an image is passed in any case where the class takes further keywords, as stock software does.

    Args:
        logits_to_keep: the last columns of which logits are computed (0: all), or their indices; by default the last.
    """
    accepted, device = inspect.signature(model.forward).parameters, input_device(model)
    further = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    chosen: dict[str, Any] = {
        name: value.to(device)
        for name, value in inputs.items()
        if name in accepted or (further and name not in OF_TEXT)
    }
    if "logits_to_keep" in accepted:
        # For a number Gemma 4's last blocks, which read others' keys and values, get only so many columns as well.
        chosen["logits_to_keep"] = torch.tensor([-1]) if logits_to_keep is None else logits_to_keep
    with torch.no_grad(), quiet_transformers(), fast_products(model):
        return model(**chosen, use_cache=False)


def input_device(model: nn.Module) -> torch.device:
    """Where a model's inputs belong."""
    device = next(model.parameters()).device
    # Offloaded by accelerate, which moves inputs itself.
    return torch.device("cpu") if device.type == "meta" else device


def steering_hooks(
    model: nn.Module, blocks: str, vectors: Mapping[int, torch.Tensor]
) -> contextlib.AbstractContextManager[None]:
    """While open, the residual stream after block ``layer`` gains ``vectors[layer]`` ([hidden]) at every position.

    Of several streams each one gains it. Layer -1 is the residual stream that enters block 0.
    """

    changes = {layer: functools.partial(gained, vector=vector) for layer, vector in vectors.items()}
    return _residual_hooks(model, blocks, changes)


@contextlib.contextmanager
def _residual_hooks(model: nn.Module, blocks: str, changes: Mapping[int, Change]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for layer, change in changes.items():
            block = model.get_submodule(f"{blocks}.{max(layer, 0)}")
            stack.enter_context(residual_hook(block, change, entering=layer == EMBEDDING))
        yield


@contextlib.contextmanager
def replaced_forwards(blocks: Iterable[nn.Module], forwards: Iterable[Callable[..., Any] | None]) -> Iterator[None]:
    """While open, each block runs its entry of ``forwards`` in place of its own forward; None is its class's."""
    # accelerate puts a forward of its own on the instance.
    before = [(block, block.__dict__.get("forward")) for block in blocks]
    try:
        for (block, _own), forward in zip(before, forwards, strict=True):
            _set_forward(block, forward)
        yield
    finally:
        for block, own in before:
            _set_forward(block, own)


def _set_forward(block: nn.Module, forward: Callable[..., Any] | None) -> None:
    block.__dict__.pop("forward", None)
    if forward is not None:
        block.__dict__["forward"] = forward


def row_vectors(vectors: Sequence[Mapping[int, torch.Tensor]]) -> dict[int, torch.Tensor]:
    """What the rows of a batch gain: layer -> [rows, 1, hidden]; a layer that no row is steered at is left out."""
    stacked = {}
    for layer in sorted({layer for row in vectors for layer in row}):
        some = next(row[layer] for row in vectors if layer in row)
        stacked[layer] = torch.stack([row.get(layer, torch.zeros_like(some)) for row in vectors])[:, None]
    return stacked


def position_limit(model: nn.Module) -> int | None:
    """The number of positions of a model with learned positions; None where positions are computed."""
    config, outside = decoder_config(model.config), tuple(f"{tower}." for tower in towers_of(model))
    for name in ("n_positions", "max_position_embeddings"):
        limit = stated(config, name)
        if isinstance(limit, int):
            tables = [
                module.num_embeddings
                for path, module in model.named_modules()
                if isinstance(module, nn.Embedding)
                and any(mark in path for mark in ("wpe", "position"))
                and not path.startswith(outside)
            ]
            return min(limit, *tables) if tables else None
    return None
