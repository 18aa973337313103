"""Residual activations: what the decoder blocks put out, at the tokens that a contrast pair reads."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn

from patcher.architectures.model_class import quiet_transformers
from patcher.errors import InputError

EMBEDDING = -1
"""The layer index of the residual stream that enters block 0."""


class Readable(Protocol):
    """A tokenised prompt: its ids, and the positions whose residuals are averaged."""

    @property
    def ids(self) -> Sequence[int]: ...

    @property
    def read(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class Residuals:
    """What was captured at one layer.

    Attributes:
        read: [prompts, hidden], fp32; each row the mean over the prompt's read positions.
        mean_norm: mean L2 norm of the residual over every token but the first (attention sinks live there).
    """

    read: torch.Tensor
    mean_norm: float


def block_output(output: Any) -> torch.Tensor:
    """The residual stream out of a block's return value."""
    hidden: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return hidden


def capture_residuals(
    model: nn.Module,
    blocks: str,
    prompts: Sequence[Readable],
    layers: Sequence[int],
    *,
    batch_size: int = 16,
    padding: Literal["right", "left"] = "right",
    pad_id: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Mapping[int, Residuals]:
    """Run the prompts and read the residual stream after each block of ``layers``.

    A batch is padded with an attention mask and explicit positions, so a prompt's residuals do not depend on what
    it is batched with. Works under any device map.

    Args:
        model: a causal LM in eval mode.
        blocks: path of its list of decoder blocks.
        prompts: token ids and read positions.
        layers: 0-based block indices; -1 is the residual stream that enters block 0.
        batch_size: prompts per forward pass.
        padding: the side that is filled up.
        pad_id: the id that fills up; it is masked out.
        progress: called with the number of prompts done after each batch.

    Returns:
        For each layer, the residuals in the order of ``prompts``, accumulated in fp64.

    Raises:
        InputError: a prompt is longer than the model's positions, or its residuals are not finite.
    """
    limit = position_limit(model)
    longest = max(len(prompt.ids) for prompt in prompts)
    if limit is not None and longest > limit:
        raise InputError(
            f"a prompt of {longest} tokens is longer than the {limit} positions of the model",
            remedy="shorten the contrast pairs",
        )
    hidden_size = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
    rows = {layer: torch.zeros(len(prompts), hidden_size, dtype=torch.float32) for layer in layers}
    norms, counted = dict.fromkeys(layers, 0.0), 0
    # Prompts of like length share a batch; the rows keep their order.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = [prompts[index] for index in chosen]
        inputs, offsets = padded([prompt.ids for prompt in batch], padding, pad_id)
        outputs = run_blocks(model, blocks, layers, inputs)
        for layer, hidden in outputs.items():
            for row, (index, prompt) in enumerate(zip(chosen, batch, strict=True)):
                states = hidden[row, offsets[row] : offsets[row] + len(prompt.ids)].double()
                rows[layer][index] = states[list(prompt.read)].mean(dim=0).float().cpu()
                inner = states[1:] if len(states) > 1 else states
                norms[layer] += float(inner.norm(dim=-1).sum())
        counted += sum(max(1, len(prompt.ids) - 1) for prompt in batch)
        if progress is not None:
            progress(start + len(chosen))
    for layer in layers:
        if not torch.isfinite(rows[layer]).all():
            raise InputError(
                "the model computes residuals that are not finite",
                where=f"layer {layer}",
                remedy="capture in a wider dtype: dtype: float32 (or bfloat16 instead of float16)",
            )
    return {layer: Residuals(rows[layer], norms[layer] / counted) for layer in layers}


def padded(
    sequences: Sequence[Sequence[int]], padding: Literal["right", "left"], pad_id: int
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


def run_blocks(
    model: nn.Module, blocks: str, layers: Sequence[int], inputs: Mapping[str, torch.Tensor]
) -> dict[int, torch.Tensor]:
    """One forward pass; the output of each block of ``layers`` (-1: what enters block 0), [batch, width, hidden]."""
    seen: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen[layer] = block_output(output).detach()

        return hook

    def keep_input(_module: nn.Module, inputs: Any, keywords: Mapping[str, Any]) -> None:
        seen[EMBEDDING] = (inputs[0] if inputs else keywords["hidden_states"]).detach()

    handles = [
        model.get_submodule(f"{blocks}.0").register_forward_pre_hook(keep_input, with_kwargs=True)
        if layer == EMBEDDING
        else model.get_submodule(f"{blocks}.{layer}").register_forward_hook(keep(layer))
        for layer in layers
    ]
    try:
        forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
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
