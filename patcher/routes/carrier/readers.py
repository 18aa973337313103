"""Which stacks read a copy with inserted blocks: it depends on how a stack knows of what type a block is.

A stack that reads the config's lists takes one more block. A stack that computes the type from a block's index takes as
many blocks as its pattern is long. The registry (``patterns``) says which does what, as it was run; of a model whose
blocks are all of one type nothing needs to be known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from patcher.architectures.analysis import Architecture
from patcher.architectures.streams import stream_count
from patcher.routes.carrier.choice import Choice
from patcher.routes.carrier.config import PER_BLOCK
from patcher.stacks.names import LLAMA_CPP, TRANSFORMERS, VLLM

SHARING: Mapping[str, tuple[str, ...]] = {
    VLLM: ("qwen3_moe", "glm4_moe", "dots1", "deepseek_v3", "granitemoehybrid"),
    LLAMA_CPP: (
        "qwen3_moe",
        "qwen3_next",
        "deepseek_v3",
        "minimax_m2",
        "glm4_moe_lite",
        "glm_moe_dsa",
        "granitemoehybrid",
    ),
}
"""Stack -> the types whose experts were run there with the coordinates shared among them."""
LISTED = "listed"
"""In the registry: the stack reads each block's type from the config's lists."""


def stacks_of_insertion(architecture: Architecture, choice: Choice, changes: Mapping[str, Any]) -> dict[str, str]:
    """Stack -> how it reads the copy: native, backend or no."""
    number = len(choice.blocks) // len(choice.insertion.layers)
    lists = {name: value for name, value in changes.items() if isinstance(value, list)}
    mixed = any(len(set(map(str, value))) > 1 for value in lists.values())
    # llama.cpp knows dense blocks only at the start.
    unlike = choice.insertion.dense or not _reads_flags(architecture, choice, LLAMA_CPP)
    types = lists.get("mlp_layer_types", [])
    # vLLM's Llama 4 takes the blocks of experts from their distance, not from the list.
    own = types != sorted(types) or PER_BLOCK in changes or "moe_layers" in changes
    read = {
        LLAMA_CPP: not unlike and _keeps(architecture, LLAMA_CPP, number, unknown=number == 1 and not mixed),
        VLLM: _reads_flags(architecture, choice, VLLM)
        and _keeps(architecture, VLLM, number, unknown=number == 1 and not own),
    }
    if any(fill.shares > 1 or fill.after for form in choice.forms.values() for fill in form.fills.values()):
        kind = architecture.config.model_type
        read = {stack: keeps and kind in SHARING[stack] for stack, keeps in read.items()}
    if architecture.quantisation is not None or stream_count(architecture) > 1:
        # What no test runs with a block that is not quantised, or with several residual streams, is not claimed.
        read = dict.fromkeys(read, False)
    total = choice.insertion.total
    return {
        TRANSFORMERS: "native",
        **{
            stack: architecture.loads.get(stack, "no") if keeps and _same_depth(architecture, stack, total) else "no"
            for stack, keeps in read.items()
        },
    }


def _reads_flags(architecture: Architecture, choice: Choice, stack: str) -> bool:
    """Whether the stack was seen to read the biases that the inserted blocks need, and that a config key creates."""
    known = {} if architecture.row is None else architecture.row.block_flags
    return all(stack in known.get(name, ()) for name in choice.flags)


def _keeps(architecture: Architecture, stack: str, number: int, *, unknown: bool) -> bool:
    """Whether every block of the base is of the same type to the stack when ``number`` blocks come before it.

    Args:
        unknown: what holds where the registry says nothing of the stack.
    """
    known = _patterns(architecture).get(stack)
    return unknown if known is None else known == LISTED or number % int(known) == 0


def _same_depth(architecture: Architecture, stack: str, total: int) -> bool:
    """Whether the stack does not take the copy, or the base, for a release that it computes in a way of its own."""
    depths = () if architecture.row is None else architecture.row.depths.get(stack, ())
    return total not in depths and architecture.block_count not in depths


def _patterns(architecture: Architecture) -> Mapping[str, int | str]:
    return {} if architecture.row is None else architecture.row.patterns


def blocks_of_pattern(architecture: Architecture) -> int | None:
    """How many blocks keep the type of every later one wherever it is known to be computed; None: one does."""
    lengths = [length for length in _patterns(architecture).values() if isinstance(length, int)]
    return math.lcm(*lengths) if lengths else None


def readers_of_pattern(architecture: Architecture) -> tuple[int, tuple[str, ...]] | None:
    """How many blocks would be inserted, and the stacks that read these and not a single one; None: it is all the same.

    From the registry alone: nothing is proven here.
    """
    counted = [stack for stack, length in _patterns(architecture).items() if isinstance(length, int)]
    number = blocks_of_pattern(architecture)
    if number is None:
        return None
    total = architecture.block_count + number
    readers = [s for s in counted if architecture.loads.get(s, "no") != "no" and _same_depth(architecture, s, total)]
    return (number, tuple(readers)) if readers else None
