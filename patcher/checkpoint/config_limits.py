"""Sizes that no model has. Libraries believe a config.json: a billion blocks are built until the memory is full."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from patcher.architectures.config_keys import BLOCK_COUNTS
from patcher.errors import InputError

_LIMITS = (
    (re.compile("|".join((r"(.*_)?n?_?layers?", *BLOCK_COUNTS))), 1024),
    (re.compile(r".*(hidden|intermediate|vocab|ffn)_?(size|dim).*|n_embd|n_inner|d_model|d_ff"), 1 << 26),
    (re.compile(r"(.*_)?num_(.*_)?(heads|experts)|n_heads?|num_labels"), 1 << 20),
)
"""What a key's name says -> its largest value. The deepest models have some 150 blocks, the widest MLPs 2**18 units."""


def require_plausible(config: Mapping[str, Any], where: str) -> None:
    """Refuse a config whose model could not exist, before any library makes lists, classes or tensors of it.

    Raises:
        InputError: with the first key that is too large.
    """
    for key, number in _integers(config, ()):
        limit = next((limit for name, limit in _LIMITS if name.fullmatch(key[-1])), None)
        if limit is not None and number > limit:
            raise InputError(
                "the config is of a model that cannot be",
                where=f"{where}: {'.'.join(key)}",
                found=f"more than {limit:,}",
                remedy="download the checkpoint again",
                code="checkpoint",
            )


def _integers(config: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    for key, value in config.items():
        if type(value) is int:
            yield (*path, key), value
        elif isinstance(value, dict) and len(path) < 3:
            yield from _integers(value, (*path, key))
