"""What configs call the same thing: the number of blocks, a window of attention, experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BLOCK_COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers", "num_decoder_layers",
)  # fmt: skip
"""The number of decoder blocks; a config may state it under several of these at once."""

WINDOWS = (
    "sliding_window", "sliding_window_size", "window_size", "attention_window_size", "local_attention",
    "attention_chunk_size",
)  # fmt: skip
"""How far attention looks back, in tokens."""

POSITIONS = ("n_positions", "max_position_embeddings")
"""How many positions a model has."""

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""The number of routed experts of a block."""

IDLE_EXPERTS = ("zero_expert_num",)
"""How many more there are to choose from that compute nothing."""

EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")
"""How many of them a token is sent to."""

EXPERT_GROUPS = ("n_group", "topk_group")
"""The number of groups of experts, and of how many of them the selected experts of a token may be."""


def stated(config: Any, name: str, default: Any = None) -> Any:
    """What a config states under ``name``, for all of its blocks; else ``default``.

    A config whose blocks differ in an attribute (Gemma 4's head_dim) raises an error that ``getattr`` with a default
    lets through. :func:`of_block` has what it is in a block.
    """
    try:
        return getattr(config, name, default)
    except RuntimeError:
        # AmbiguousGlobalPerLayerAttributeError, a class that releases before 5.20 or so do not have.
        return default


def of_block(config: Any, layer: int) -> Any:
    """The config of one block, in which the attributes that differ from block to block are this block's."""
    return config.per_layer_config[layer] if stated(config, "is_heterogeneous", False) else config


def whole_number(config: Any, name: str) -> int | None:
    """What a config (or the mapping of a config.json) states under ``name``, if that is a whole number."""
    value = config.get(name) if isinstance(config, Mapping) else stated(config, name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def block_count(config: Any) -> int:
    """Number of decoder blocks of a transformers config, which is not what each calls ``num_hidden_layers``."""
    # Beside an encoder that has the other number, or the times that a stack is run through.
    for name in ("decoder_layers", "num_layers_per_stack", "num_decoder_layers"):
        if (count := whole_number(config, name)) is not None:
            return count
    derived = isinstance(getattr(type(config), "num_hidden_layers", None), property)
    if derived and (count := whole_number(config, "num_layers")) is not None:
        return count  # beside the caches that they need
    return int(config.num_hidden_layers)


def stated_block_count(config: Mapping[str, Any]) -> int | None:
    """The number of decoder blocks that a config.json states, if it does."""
    return next((count for name in BLOCK_COUNTS if (count := whole_number(config, name)) is not None), None)


def stated_positions(config: Any) -> int | None:
    """The number of positions that a config (or the mapping of a config.json) states, if it does."""
    return next((count for name in POSITIONS if (count := whole_number(config, name))), None)


def windows(config: Any) -> dict[str, int]:
    """Every window that a config (or the mapping of a config.json) states: key -> tokens."""
    sizes = {name: whole_number(config, name) for name in WINDOWS}
    return {name: size for name, size in sizes.items() if size is not None and size > 0}
