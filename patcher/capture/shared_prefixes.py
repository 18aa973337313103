"""May prompts share a row, or a batch? Decided per architecture, by computing it on a tiny stand-in.

A tree of tokens in one row is exact under two conditions. A token sees others only through attention, with the mask
that is given. And it knows its place only by the position that is given. State-space layers, ALiBi, or positions taken
from the index in the row break this. No list of names says which class does what; the stand-in does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from patcher.architectures.analysis import Architecture
from patcher.architectures.config_keys import EXPERTS, of_block, stated, whole_number, windows
from patcher.architectures.decoder import decoder_config
from patcher.architectures.model_class import quiet_transformers
from patcher.architectures.shrink import shrink_config
from patcher.architectures.stand_in import build_stand_in, randomise
from patcher.capture.batches import Batch, PromptRow, make_batches, plain_rows, shared_rows
from patcher.capture.forward import run_blocks
from patcher.errors import InputError
from patcher.errors.causes import cause_of

TOLERANCE = 2e-5
_WIDE = 4096
# Attention over short rows runs at about a third of the rate of the matrix products.
_ATTENTION_COST = 3.0


@dataclass(frozen=True)
class Exactness:
    """What may be computed together.

    Attributes:
        sharing: None if prompts may share the tokens that they begin with, else why not.
        padding: whether rows of different length may share a batch (filled up on the right).
        window: the most tokens that a row of several prompts may hold, where attention is limited to a window.
        linear_tokens: what a token costs in a block's matrix products, in units of attending to one other token.
    """

    sharing: str | None
    padding: bool
    window: int | None
    linear_tokens: float


@dataclass(frozen=True)
class _Prompt:
    ids: tuple[int, ...]
    read: tuple[int, ...]


def exactness(architecture: Architecture, layer: int) -> Exactness:
    """What blocks 0 to ``layer`` of this architecture compute alike, alone and together."""
    config = architecture.config
    window = min(windows(config).values(), default=None)
    linear = linear_tokens(architecture)
    try:
        model, blocks = _stand_in(architecture, max(layer, 0)), architecture.blocks
    except InputError as error:
        return Exactness(f"no tiny stand-in could be built ({error.problems[0].message})", False, window, linear)
    prompts = _prompts(int(decoder_config(model.config).vocab_size))
    alone = [_read(model, blocks, _batch([prompt], shared=False)) for prompt in prompts]
    wanted = torch.cat(alone)
    padded = _compare(model, blocks, _batch(prompts, shared=False), wanted)
    shared = _compare(model, blocks, _batch(prompts, shared=True), wanted)
    return Exactness(
        None if shared is None else f"sharing prefixes is not exact for {architecture.class_name} ({shared})",
        padded is None,
        window,
        linear,
    )


def linear_tokens(architecture: Architecture) -> float:
    """A block's weights over the width of its attention, in tokens; of experts, those that a token passes."""
    config = architecture.config
    prefix = f"{architecture.blocks}.{architecture.block_count // 2}."
    experts = next((count for name in EXPERTS if (count := whole_number(config, name)) is not None), None)
    active = stated(config, "num_experts_per_tok") or 1
    weights = 0.0
    for name, shape in architecture.parameters.items():
        if name.startswith(prefix) and len(shape) >= 2:
            routed = len(shape) == 3 and experts is not None and shape[0] == experts
            weights += math.prod(shape) * (active / shape[0] if routed else 1.0)
    block = of_block(config, architecture.block_count // 2)
    heads, width = whole_number(block, "num_attention_heads"), whole_number(block, "head_dim")
    attention = (heads or 0) * (width or 0) or architecture.hidden
    return weights / (2.0 * _ATTENTION_COST * attention)


def displaced_prompt(rows: Sequence[PromptRow]) -> int:
    """The shortest prompt of which a token does not lie where it would in a row of its own; else the shortest."""
    prompts = [(path[-1] == len(path) - 1, len(path), prompt) for row in rows for prompt, path in row.paths.items()]
    return min(prompts)[2]


def _stand_in(architecture: Architecture, layer: int) -> nn.Module:
    tiny, _ = shrink_config(architecture.config, layer)
    for name in windows(tiny):
        # Rows within the window are what is asked about; the stand-in's prompts must be as well.
        setattr(tiny, name, _WIDE)
    model = build_stand_in(tiny, trust_remote_code=architecture.trust_remote_code)
    randomise(model, torch.Generator().manual_seed(0))
    return model


def _prompts(vocabulary: int) -> list[_Prompt]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, vocabulary, (24,), generator=generator).tolist()
    endings = [(9, tokens[14:15]), (9, tokens[15:18]), (5, tokens[18:24]), (9, []), (0, tokens[10:17])]
    prompts = [tuple(tokens[:start] + ending) for start, ending in endings]
    return [_Prompt(ids, (len(ids) - 1, len(ids) // 2)) for ids in prompts]


def _batch(prompts: Sequence[_Prompt], *, shared: bool) -> Batch:
    rows = plain_rows(prompts)
    if shared:
        rows, others = [PromptRow([], [], {})], shared_rows(prompts, linear_tokens=1e9, longest=_WIDE)
        for row in others:
            rows[0].append(row)
    (batch,) = make_batches(rows, prompts, token_budget=_WIDE)
    return batch


def _read(model: nn.Module, blocks: str, batch: Batch) -> torch.Tensor:
    """[prompts, layers, hidden]: what each prompt reads, at every block."""
    layers = range(len(model.get_submodule(blocks)))  # type: ignore[arg-type]
    with quiet_transformers():
        found = run_blocks(model, blocks, layers, batch.inputs_in(torch.float32))
    states = torch.stack([found[layer] for layer in layers], dim=2)
    places = sorted(batch.places, key=lambda place: place.prompt)
    return torch.stack([states[place.row, list(place.columns)].mean(dim=0) for place in places])


def _compare(model: nn.Module, blocks: str, batch: Batch, wanted: torch.Tensor) -> str | None:
    try:
        found = _read(model, blocks, batch)
    except Exception as error:
        # A class that was not made for such a mask fails in a way of its own.
        return cause_of(error)
    off = float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-6)).nan_to_num(math.inf).max())
    return None if off <= TOLERANCE else f"off by {off:.1e} on a tiny model"
